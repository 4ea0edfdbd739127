"""The models on a real Ray Serve, through its gRPC proxy and the services' own client."""

import asyncio
import io
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from integration.ray_head import RayHead
from integration.serving_application import publish_lora, serving_command
from toile.core.artifacts import open_store
from toile.core.bases import import_base
from toile.core.catalog.engine import open_catalog
from toile.core.errors import (
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    ToileError,
)
from toile.core.inference import Inference
from toile.core.settings import Limits, Settings
from toile.v1 import common_pb2, inference_pb2
from toile.v1.inference_pb2_grpc import InferenceServiceStub

pytestmark = pytest.mark.timeout(900)

RUNNING = 2
QUEUED = 2
SIDE = 128


@dataclass(frozen=True)
class Deployed:
    settings: Settings
    base: str
    adapter: str
    ray_address: str


@pytest.fixture(scope="module")
def deployed(
    ray_head: RayHead, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Deployed:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(
        home=home,
        limits=Limits(running_generations=RUNNING, queued_generations=QUEUED),
        cpu_threads=1,  # other tests keep the cores busy
    )
    catalog, store = open_catalog(settings), open_store(settings)
    catalog.migrate()
    base = import_base(settings, catalog, store, tiny_bundle)
    catalog.close()
    adapter = "projects/default/models/lace/versions/1/job"
    publish_lora(store, adapter, home / "lora", tiny_bundle, base.digest)
    answer = serving_command(settings, ray_head.address, "deploy")
    return Deployed(
        settings.model_copy(update={"inference_address": f"127.0.0.1:{answer['port']}"}),
        base.artifact,
        adapter,
        ray_head.address,
    )


@pytest.fixture
async def models(deployed: Deployed) -> AsyncIterator[Inference]:
    async with Inference.connect(deployed.settings) as inference:
        yield inference


async def test_images_depend_on_their_seed_alone(models: Inference, deployed: Deployed) -> None:
    both = await _draw(models, _request(deployed, seeds=[1, 2]))
    second = await _draw(models, _request(deployed, seeds=[2]))
    assert len(both) == 2
    assert both[0] != both[1]
    assert second == [both[1]]
    assert Image.open(io.BytesIO(both[0])).size == (SIDE, SIDE)


async def test_steps_are_reported_in_order_and_not_too_many(
    models: Inference, deployed: Deployed
) -> None:
    request = _request(deployed, seeds=[1, 2], steps=40)
    started = time.monotonic()
    events = [event async for event in models.diffuse(request)]
    seconds = time.monotonic() - started
    kinds = [e.WhichOneof("event") for e in events]
    first, second = (index for index, kind in enumerate(kinds) if kind == "image")
    assert second == len(kinds) - 1
    for image, part in enumerate((events[:first], events[first + 1 : second])):
        steps = [e.step.step for e in part]
        assert {(e.step.image_index, e.step.total_steps) for e in part} == {(image, 40)}
        assert steps == sorted(set(steps))
        assert steps[-1] == 40
    assert len(events) <= 10 * seconds + 5


async def test_an_adapter_changes_the_image_by_its_weight(
    models: Inference, deployed: Deployed
) -> None:
    images = {}
    for weight in (0.0, 1.0):
        adapters = [inference_pb2.Adapter(artifact=deployed.adapter, weight=weight)]
        (images[weight],) = await _draw(models, _request(deployed, adapters=adapters))
    (plain,) = await _draw(models, _request(deployed))
    assert _difference(images[0.0], plain) <= 1
    assert _difference(images[1.0], plain) > 8


async def test_the_refiner_redraws_and_is_counted(models: Inference, deployed: Deployed) -> None:
    request = _request(deployed, steps=5, refiner_strength=0.4)
    events = [event async for event in models.diffuse(request)]
    steps = [e.step.step for e in events if e.HasField("step")]
    assert steps[0] == 1
    assert steps[-1] == 5
    (plain,) = await _draw(models, _request(deployed, steps=5))
    assert _difference(events[-1].image.png, plain) > 0


async def test_a_long_prompt_draws_a_tile_with_previews(
    models: Inference, deployed: Deployed
) -> None:
    request = _request(
        deployed,
        prompt="(red:1.2) lace " * 40,
        steps=4,
        repeat=common_pb2.REPEAT_HALF_DROP,
        preview_interval=2,
    )
    events = [event async for event in models.diffuse(request)]
    assert [e.preview.step for e in events if e.HasField("preview")] == [2, 4]
    assert Image.open(io.BytesIO(events[-2].preview.jpeg)).size == (SIDE, SIDE)
    assert Image.open(io.BytesIO(events[-1].image.png)).size == (SIDE, SIDE)


async def test_inpainting_leaves_the_outside_alone(models: Inference, deployed: Deployed) -> None:
    rng = np.random.default_rng(0)
    start = Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (32, 32, 96, 96))
    request = _request(
        deployed, init_image=_png(start), mask_image=_png(mask), strength=0.8, steps=4
    )
    (drawn,) = await _draw(models, request)
    before, after = np.asarray(start), np.asarray(Image.open(io.BytesIO(drawn)))
    outside = np.asarray(mask) == 0
    assert (before[outside] == after[outside]).all()
    assert (before[~outside] != after[~outside]).mean() > 0.9


async def test_a_caller_that_leaves_stops_the_drawing(
    models: Inference, deployed: Deployed
) -> None:
    """One image of 20,000 steps would take minutes; leaving, others get their turn at once."""
    for _ in range(RUNNING):
        stream = models.diffuse(_request(deployed, steps=20_000))
        await anext(stream)
        await stream.aclose()
    async with asyncio.timeout(20):
        await _draw(models, _request(deployed, steps=2))


async def test_a_caller_that_stops_reading_and_leaves_stops_the_drawing(
    models: Inference, deployed: Deployed
) -> None:
    """The proxy then waits for the caller to take a message, and Ray Serve tells no replica."""
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    async with grpc.aio.insecure_channel(
        deployed.settings.inference_address, options=narrow
    ) as channel:
        request = _request(deployed, steps=20_000, preview_interval=1)
        call = InferenceServiceStub(channel).Diffuse(metadata=[("application", "toile")])
        await call.write(request)
        await call.read()
        await asyncio.sleep(5)
        call.cancel()
    async with asyncio.timeout(20):
        await _draw(models, _request(deployed, steps=2))


async def test_a_deadline_stops_the_drawing(models: Inference, deployed: Deployed) -> None:
    with pytest.raises(ToileError) as caught:
        async for _ in models.diffuse(_request(deployed, steps=20_000), timeout_seconds=2):
            pass
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    await _draw(models, _request(deployed, steps=2))


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (
            {"adapters": [inference_pb2.Adapter(artifact="projects/p/none", weight=1)]},
            NotFoundError,
            "ARTIFACT_NOT_FOUND",
        ),
        ({"base_artifact": "bases/none/000000000000"}, NotFoundError, "ARTIFACT_NOT_FOUND"),
        ({"scheduler": "MagicScheduler"}, InvalidArgumentError, "UNKNOWN_SCHEDULER"),
        ({"prompt": "red " * 700}, InvalidArgumentError, "PROMPT_TOO_LONG"),
        ({"init_image": b"no image"}, InvalidArgumentError, "NOT_AN_IMAGE"),
    ],
)
async def test_errors_arrive_as_what_they_are(
    models: Inference,
    deployed: Deployed,
    change: dict[str, object],
    kind: type[ToileError],
    reason: str,
) -> None:
    with pytest.raises(kind) as caught:
        await _draw(models, _request(deployed, **change))
    assert caught.value.reason == reason


async def test_pictures_are_judged(models: Inference, deployed: Deployed) -> None:
    picture = _png(Image.new("RGB", (SIDE, SIDE), "red"))
    (image,) = await models.embed_images(deployed.base, [picture])
    texts = await models.embed_texts(deployed.base, ["a red dress", "a blue hat"])
    assert np.linalg.norm(image) == pytest.approx(1, abs=1e-4)
    assert [len(text) for text in texts] == [len(image), len(image)]
    labels, names = await models.segment(deployed.base, picture)
    assert names[0] == "background"
    assert Image.open(io.BytesIO(labels)).size == (SIDE, SIDE)
    assert await models.describe(deployed.base, picture)
    with pytest.raises(InvalidArgumentError) as caught:
        await models.describe(deployed.base, b"no image")
    assert caught.value.reason == "NOT_AN_IMAGE"


async def test_a_full_queue_refuses(models: Inference, deployed: Deployed) -> None:
    """One after another, for Serve does not count those that come in the same moment."""

    async def endless() -> None:
        async for _ in models.diffuse(_request(deployed, steps=20_000)):
            pass

    tasks: list[asyncio.Task[None]] = []
    done: set[asyncio.Task[None]] = set()
    try:
        while not done and len(tasks) < RUNNING + QUEUED + 4:
            tasks.append(asyncio.create_task(endless()))
            # As many as wait in the replica may wait for it.
            patience = 1 if len(tasks) <= RUNNING + 2 * QUEUED else 30
            done, _ = await asyncio.wait(
                tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
        assert {type(task.exception()) for task in done} == {ExhaustedError}
        assert len(tasks) > RUNNING + QUEUED
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await _draw(models, _request(deployed, steps=2))


@pytest.mark.slow
async def test_a_drawing_whose_replica_is_killed_goes_on(
    models: Inference, deployed: Deployed
) -> None:
    """Each image is told of once, and is the one that would have been drawn undisturbed.

    So is that of a drawing that waits for its turn, so that nobody has heard of it yet.
    """
    request = _request(deployed, seeds=[1, 2], steps=60)
    images: list[tuple[int, bytes]] = []
    waiting: asyncio.Task[list[bytes]] | None = None
    killed = False
    async for event in models.diffuse(request):
        if event.HasField("image"):
            images.append((event.image.image_index, event.image.png))
        elif images and waiting is None:
            waiting = asyncio.create_task(_draw(models, _request(deployed, seeds=[2], steps=60)))
        elif images and not killed and event.step.step > 20:
            killed = True
            await asyncio.to_thread(_kill_replica, deployed)
    assert killed
    assert [index for index, _ in images] == [0, 1]
    (undisturbed,) = await _draw(models, _request(deployed, seeds=[2], steps=60))
    assert images[1][1] == undisturbed
    assert waiting is not None
    assert await waiting == [undisturbed]
    assert serving_command(deployed.settings, deployed.ray_address, "status")["state"] == "RUNNING"


def _request(deployed: Deployed, **fields: object) -> inference_pb2.DiffuseRequest:
    request = {
        "base_artifact": deployed.base,
        "prompt": "a red dress",
        "seeds": [1],
        "steps": 2,
        "guidance_scale": 5.0,
        "width": SIDE,
        "height": SIDE,
        **fields,
    }
    return inference_pb2.DiffuseRequest(**request)


async def _draw(models: Inference, request: inference_pb2.DiffuseRequest) -> list[bytes]:
    return [e.image.png async for e in models.diffuse(request) if e.HasField("image")]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _difference(one: bytes, other: bytes) -> int:
    pixels = [np.asarray(Image.open(io.BytesIO(data)), int) for data in (one, other)]
    return int(abs(pixels[0] - pixels[1]).max())


def _kill_replica(deployed: Deployed) -> None:
    """Kill the replica's process, in another process that joins the cluster for it."""
    code = (
        "import os, ray, signal\n"
        "from ray.util.state import list_actors\n"
        f"ray.init(address={deployed.ray_address!r}, log_to_driver=False)\n"
        f"actors = list_actors({deployed.ray_address!r}, detail=True,"
        " filters=[('state', '=', 'ALIVE')])\n"
        "(pid,) = [a.pid for a in actors if 'SERVE_REPLICA' in (a.name or '')]\n"
        "os.kill(pid, signal.SIGKILL)\n"
    )
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
