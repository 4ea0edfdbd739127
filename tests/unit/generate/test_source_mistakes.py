"""Sources that cannot be drawn from: told before anything is recorded or drawn."""

from typing import Any

import numpy as np
import pytest

from servers.generating import Painter, count, generate, refused
from servers.platform import PARENT, Platform
from toile.core.catalog.models import GenerationRow, ImageRow
from toile.core.errors import DataLossError, InvalidArgumentError, NotFoundError


def noise(height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 255, (height, width, 3), np.uint8)


def mask_of(box: tuple[int, int, int, int], height: int = 96, width: int = 128) -> np.ndarray:
    """White within left, top, right, bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def inpaint(**fields: Any) -> dict[str, Any]:
    return {"inpaint": {"image": "{image}", "mask": "{mask}", **fields}}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "kind", "reason", "field"),
    [
        ({"redesign": {"image": "x"}}, InvalidArgumentError, "BAD_RESOURCE_NAME", "redesign.image"),
        ({"redesign": {}}, InvalidArgumentError, "BAD_RESOURCE_NAME", "redesign.image"),
        (
            {"redesign": {"image": f"{PARENT}/images/none"}},
            NotFoundError,
            "IMAGE_NOT_FOUND",
            "redesign.image",
        ),
        ({"redesign": {"image": "{other}"}}, NotFoundError, "IMAGE_NOT_FOUND", "redesign.image"),
        (inpaint(mask="{other}"), NotFoundError, "IMAGE_NOT_FOUND", "inpaint.mask"),
        (inpaint(mask="{small}"), InvalidArgumentError, "MASK_SIZE", "inpaint.mask"),
        (inpaint(mask="{black}"), InvalidArgumentError, "EMPTY_MASK", "inpaint.mask"),
        (inpaint(mask=""), InvalidArgumentError, "NO_MASK", "inpaint.mask"),
        (inpaint(mask="", expansion={}), InvalidArgumentError, "NO_MASK", "inpaint.mask"),
        (inpaint(mask_blur=65), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.mask_blur"),
        (inpaint(mask_blur=-1), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.mask_blur"),
        (inpaint(mask_blur=NAN), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.mask_blur"),
        (inpaint(padding=-1), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.padding"),
        (inpaint(preparation=9), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.preparation"),
        (inpaint(strength=0), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.strength"),
        (inpaint(strength=INF), InvalidArgumentError, "INVALID_ARGUMENT", "inpaint.strength"),
        (
            inpaint(expansion={"left": -1}),
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "inpaint.expansion.left",
        ),
        (
            inpaint(expansion={"top": 5000}),
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "inpaint.expansion.top",
        ),
        (
            {**inpaint(), "repeat": "REPEAT_STRAIGHT"},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "repeat",
        ),
        (
            {"redesign": {"image": "{image}", "strength": NAN}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "redesign.strength",
        ),
        (
            {"redesign": {"image": "{image}", "strength": 1.1}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "redesign.strength",
        ),
        (
            {"redesign": {"image": "{image}", "strength": 0.04}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "redesign.strength",
        ),
        (
            {"redesign": {"image": "{image}"}, "refiner": {}},
            InvalidArgumentError,
            "REFINER_WITH_SOURCE",
            "refiner",
        ),
        (
            {"redesign": {"image": "{image}"}, "width": 100},
            InvalidArgumentError,
            "BAD_SIZE",
            "width",
        ),
        (
            {"upscale": {"image": "{image}", "factor": 4.5}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "upscale.factor",
        ),
        (
            {"upscale": {"image": "{image}", "factor": NAN}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "upscale.factor",
        ),
        (
            {"upscale": {"image": "{image}", "overlap": 65}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "upscale.overlap",
        ),
        (
            {"upscale": {"image": "{image}", "overlap": -1}},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "upscale.overlap",
        ),
        (
            {"upscale": {"image": "{image}"}, "width": 128},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "width",
        ),
        (
            {"upscale": {"image": "{image}"}, "aspect_ratio": "1:1"},
            InvalidArgumentError,
            "INVALID_ARGUMENT",
            "aspect_ratio",
        ),
        (
            {"upscale": {"image": "{long}", "factor": 4}},
            InvalidArgumentError,
            "BAD_SIZE",
            "upscale.factor",
        ),
    ],
)
async def test_mistakes_about_sources(
    platform: Platform,
    painter: Painter,
    fields: dict[str, Any],
    kind: type,
    reason: str,
    field: str,
) -> None:
    made = {
        "{image}": platform.add_image(noise()),
        "{mask}": platform.add_image(mask_of((32, 32, 96, 64))),
        "{black}": platform.add_image(mask_of((0, 0, 0, 0))),
        "{small}": platform.add_image(mask_of((0, 0, 8, 8), 64, 64)),
        "{long}": platform.add_image(noise(32, 1200)),
        "{other}": platform.add_image(noise(), project="rival"),
    }
    for source in fields.values():
        for key in ("image", "mask"):
            if isinstance(source, dict) and source.get(key) in made:
                source[key] = made[source[key]]
    error = await refused(platform, **fields)
    assert isinstance(error, kind)
    assert (error.reason, error.metadata.get("field")) == (reason, field)
    assert count(platform, GenerationRow) == 0
    assert not painter.requests


async def test_the_nearest_size_of_an_upscale_can_be_had(
    platform: Platform, painter: Painter
) -> None:
    source = platform.add_image(noise(64, 1200))
    error = await refused(platform, upscale={"image": source, "factor": 4})
    width, height = map(int, error.metadata["nearest"].split("x"))
    await generate(platform, upscale={"image": source, "factor": width / 1200})
    assert (painter.requests[0].width, painter.requests[0].height) == (width, height)


async def test_a_damaged_source_is_told_of(platform: Platform, painter: Painter) -> None:
    source = platform.add_image(noise())
    with platform.catalog.reading() as session:
        artifact = session.get_one(ImageRow, source).artifact
    platform.store.put(artifact, b"no image")
    error = await refused(platform, redesign={"image": source})
    assert (error.reason, error.metadata["field"]) == ("NOT_AN_IMAGE", "redesign.image")
    platform.store.delete(artifact)
    assert isinstance(
        await refused(platform, redesign={"image": source}), NotFoundError | DataLossError
    )
    assert not painter.requests


class TestSmallLimits:
    @pytest.fixture
    def settings(self) -> dict[str, Any]:
        return {"limits": {"image_pixels": 10_000}}

    async def test_a_source_that_is_too_large(self, platform: Platform, painter: Painter) -> None:
        source = platform.add_image(noise(96, 128))
        error = await refused(platform, redesign={"image": source})
        assert (error.reason, error.metadata["field"]) == ("TOO_MANY_PIXELS", "redesign.image")
        small = platform.add_image(noise(90, 90))
        expansion = {"left": 90, "top": 0}
        error = await refused(platform, inpaint={"image": small, "expansion": expansion})
        assert (error.reason, error.metadata["field"]) == ("TOO_MANY_PIXELS", "inpaint.expansion")
        assert not painter.requests
