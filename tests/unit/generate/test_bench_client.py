"""The benchmark's clients draw as users do: through GenerateService."""

import asyncio
import io
from pathlib import Path

import pytest
from PIL import Image

from servers.generating import Painter
from servers.platform import Platform
from toile.core.catalog.models import GenerationRow
from toile.core.rpc.client import Clients

ROOT = Path(__file__).resolve().parents[3]


async def test_its_client_has_the_image_that_the_service_stored(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
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
