"""What the fake services know."""

import hashlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from toile.core.errors import NotFoundError
from toile.imaging import png
from toile.v1 import (
    common_pb2,
    dataset_pb2,
    generate_pb2,
    job_pb2,
    rank_pb2,
    refine_pb2,
    train_pb2,
)

PROJECT = "projects/default"


@dataclass
class World:
    """What the fakes know. Hooks run `before` a call, or `during` its stream."""

    datasets: dict[str, dataset_pb2.Dataset] = field(default_factory=dict)
    photographs: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    versions: dict[str, dataset_pb2.DatasetVersion] = field(default_factory=dict)
    jobs: dict[str, job_pb2.Job] = field(default_factory=dict)
    sampled: set[str] = field(default_factory=set)  # jobs that were asked for samples
    models: dict[str, train_pb2.ModelVersion] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    generations: dict[str, generate_pb2.Generation] = field(default_factory=dict)
    images: dict[str, tuple[common_pb2.Image, bytes]] = field(default_factory=dict)
    rankings: dict[str, rank_pb2.Ranking] = field(default_factory=dict)
    refinements: dict[str, refine_pb2.Refinement] = field(default_factory=dict)
    requests: dict[tuple[str, str], Any] = field(default_factory=dict)
    aspects: dict[str, str] = field(default_factory=dict)
    """Asked for, by the versions that were built."""
    trainings: list[train_pb2.CreateTrainingJobRequest] = field(default_factory=list)
    batches: list[generate_pb2.GenerateBatchRequest] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    during: dict[str, Callable[[], None]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def enter(self, call: str) -> None:
        self.calls[call] += 1
        self.before.get(call, lambda: None)()

    def once(self, call: str, request_id: str, make: Callable[[], Any]) -> Any:
        """Answer the same request id with the same thing."""
        with self.lock:
            key = (call, request_id)
            if not request_id or key not in self.requests:
                self.requests[key] = make()
            return self.requests[key]

    def add_image(
        self, colour: tuple[int, int, int], origin: Any, **fields: Any
    ) -> common_pb2.Image:
        picture = Image.new("RGB", (64, 64), (245, 244, 240))
        picture.paste(colour, (16, 8, 48, 56))
        name = f"{PROJECT}/images/img-{len(self.images) + 1}"
        data = png.encode(picture, toile={"image": name})
        image = common_pb2.Image(
            name=name,
            origin=origin,
            media_type="image/png",
            width=64,
            height=64,
            digest=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            **fields,
        )
        self.images[name] = (image, data)
        return image


def get(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise NotFoundError(f"there is no {name}")
    return table[name]


def wait_until(condition: Callable[[], bool]) -> None:
    """Give a client time to go away; a test that waits in vain fails later."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def press_ctrl_c() -> None:
    """Interrupt the main thread, as a terminal does."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)
    time.sleep(1.0)  # on a busy machine the stream would end before the main thread wakes
