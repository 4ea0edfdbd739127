"""The whole platform, as `toile up` starts it, in a home of the benchmark's own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from toile.cli.platform.processes import marked
from toile.cli.platform.state import read_state
from toile.core.bases import resolve_base
from toile.core.catalog.engine import open_catalog
from toile.core.rpc.client import Clients
from toile.core.settings import Settings
from toile.diffusion.networks import UNET
from toile.diffusion.triton.repository import VERSION
from toile.serving.engines import model_name
from toile.v1 import generate_pb2

PROJECT = "projects/bench"

ENGINES_SECONDS = 600.0
"""How long an export may take on a busy machine."""


@dataclass(frozen=True)
class Platform:
    """A running platform."""

    settings: Settings
    """With the addresses of its services."""
    clients: Clients
    """What its users have; for several threads."""
    base_artifact: str

    @property
    def onnx(self) -> Path:
        """The engine that its Triton runs."""
        models = self.settings.home_path / "triton" / "models"
        digest = self.base_artifact.rpartition("/")[2]
        return models / model_name(digest, UNET) / VERSION / "unet.onnx"

    def draw(
        self,
        prompt: str,
        *,
        seed: int,
        steps: int,
        guidance_scale: float,
        adapter: str = "",
    ) -> bytes:
        """Draw an image as a user does, with a model version or without; return its file."""
        request = generate_pb2.GenerateRequest(
            parent=PROJECT,
            prompt=prompt,
            seeds=[seed],
            steps=steps,
            guidance_scale=guidance_scale,
        )
        if adapter:
            request.adapters.add(model=adapter)
        file = b""
        for event in self.clients.generate.Generate(request):
            if event.HasField("image"):
                wanted = generate_pb2.DownloadImageRequest(name=event.image.name)
                pieces = self.clients.generate.DownloadImage(wanted)
                file = b"".join(piece.chunk for piece in pieces)
        return file


@contextlib.contextmanager
def platform(
    home: Path, run: dict[str, Any], variables: Mapping[str, str] | None = None
) -> Iterator[Platform]:
    """Start a platform with its engines ready, and stop it at the end.

    Args:
        home: Its `TOILE_HOME`, which keeps the exported engines for the next time.
        run: Its processors' seconds are added to `own_seconds`.
        variables: More settings.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOILE_", "RAY_"))}
    environment = {**kept, "TOILE_HOME": str(home), **(variables or {})}

    def toile(command: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "toile.cli", command, "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return json.loads(done.stdout)

    toile("down")  # what a run left that was cut off
    try:
        state = toile("up")
        if state.get("status") != "ready":
            raise RuntimeError(f"the platform did not start: {state}")
        deadline = time.monotonic() + ENGINES_SECONDS
        while not _has_engines(state := toile("status")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the engines did not come: {state}")
            time.sleep(2.0)
        addresses = {k: v for k, v in state["addresses"].items() if k.endswith("_address")}
        settings = Settings(home=home, **addresses)
        clients = Clients(settings)
        try:
            yield Platform(settings, clients, _base_artifact(settings))
        finally:
            clients.close()
        run["own_seconds"] += _seconds_of(home)
    finally:
        toile("down")


def _has_engines(state: Any) -> bool:
    return any(p["name"] == "engines" and p["status"] == "ready" for p in state["parts"])


def _base_artifact(settings: Settings) -> str:
    catalog = open_catalog(settings)
    try:
        with catalog.reading() as session:
            return resolve_base(session, settings.default_base).artifact
    finally:
        catalog.close()


def _seconds_of(home: Path) -> float:
    """Return what the processes of a platform took of the processors, those that ended included."""
    state = read_state(home / "run" / "platform.json")
    total = 0.0
    for process in marked(state.id) if state is not None else ():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
