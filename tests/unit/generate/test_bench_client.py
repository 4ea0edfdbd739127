"""The benchmark's clients draw as users do: through GenerateService."""

import asyncio
import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from servers.generating import Painter
from servers.platform import Platform
from toile.core.catalog.models import GenerationRow
from toile.core.rpc.client import Clients

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


async def test_its_client_has_the_image_that_the_service_stored(
    platform: Platform, painter: Painter
) -> None:
    from serve import stack

    address = f"127.0.0.1:{platform.service.port}"
    settings = platform.settings.model_copy(update={"generate_address": address})
    clients = Clients(settings)
    measured = stack.Platform(settings, clients, "bases/tiny/0123")
    try:
        file = await asyncio.to_thread(
            measured.draw, "a red dress", seed=7, steps=3, guidance_scale=2.0
        )
    finally:
        clients.close()
    (asked,) = painter.requests
    assert (asked.prompt, list(asked.seeds), asked.steps) == ("a red dress", [7], 3)
    assert Image.open(io.BytesIO(file)).format == "PNG"
    with platform.catalog.reading() as session:
        (generation,) = session.query(GenerationRow)
    assert generation.project == "bench"


def test_clients_draw_with_a_lora_each_or_with_one_for_all() -> None:
    from serve import platform_mixed, scale

    drawn: list[tuple[str, int]] = []
    lock = threading.Lock()

    def draw(prompt: str, *, seed: int, adapter: str, **_: Any) -> None:
        with lock:
            drawn.append((adapter, seed))

    bench = SimpleNamespace(scale=scale.SMALLEST)
    found = platform_mixed._arms(bench, SimpleNamespace(draw=draw), ["a", "b"])
    images = found["images_per_client"]
    each = {("a", seed) for seed in range(images)} | {
        ("b", images + seed) for seed in range(images)
    }
    assert drawn[:2] == [("a", 0), ("b", 0)]
    assert set(drawn[2 : 2 + 2 * images]) == each
    assert set(drawn[2 + 2 * images :]) == {("a", seed) for seed in range(2 * images)}
    assert set(found["images_per_second"]) == {"a LoRA each", "one LoRA"}
