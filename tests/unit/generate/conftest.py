"""The generate service over models that draw at once."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from servers.generating import Painter
from servers.platform import Platform, running_platform
from toile.core.artifacts import publish
from toile.generate.__main__ import build_service


@pytest.fixture
def settings() -> dict[str, Any]:
    """What this platform's settings differ in."""
    return {}


@pytest.fixture
async def platform(tmp_path: Path, settings: dict[str, Any]) -> AsyncIterator[Platform]:
    """The service with two bases: tiny, with a refiner, and other."""
    async with running_platform(tmp_path, build_service, **settings) as running:
        words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        files = {
            "scheduler/scheduler_config.json": b'{"_class_name": "EulerDiscreteScheduler"}',
            "tokenizer/tokenizer.json": words.to_str().encode(),
        }
        own = {"refiner/unet/config.json": b"{}", "toile.json": b'{"guidance_scale": 3}'}
        publish(running.store, "bases/tiny/0123", {**files, **own})
        publish(running.store, "bases/other/0123", files)
        yield running


@pytest.fixture
def painter(platform: Platform) -> Painter:
    """What the platform's models draw."""
    painter = Painter()
    platform.models.painter = painter.draw
    return painter
