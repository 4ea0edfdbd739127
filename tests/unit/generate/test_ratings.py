"""What is for adults: refused by default, rated where it is allowed."""

from typing import Any

import numpy as np
import pytest

from servers.generating import Painter, count, download, generate, refused, stub, upload
from servers.platform import PARENT, Platform, png
from toile.core.catalog.models import GenerationRow
from toile.core.errors import FailedPreconditionError
from toile.v1 import common_pb2, generate_pb2

GENERAL, RESTRICTED = common_pb2.CONTENT_RATING_GENERAL, common_pb2.CONTENT_RATING_RESTRICTED
PICTURE = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a nude woman"},
        {"prompt": "a dress, N.S.F.W, NSFW"},
        {"prompt": "a {red dress|nude_woman}", "count": 20},
        {"prompt": "a __what__", "wildcards": {"what": {"values": ["Full-Frontal view"]}}},
    ],
)
async def test_it_is_refused_before_anything_is_drawn(
    platform: Platform, painter: Painter, fields: dict[str, Any]
) -> None:
    error = await refused(platform, **fields)
    assert isinstance(error, FailedPreconditionError)
    assert (error.reason, error.metadata["field"]) == ("RESTRICTED_CONTENT", "prompt")
    assert count(platform, GenerationRow) == 0
    assert not painter.requests


async def test_what_is_to_be_avoided_may_be_named(platform: Platform, painter: Painter) -> None:
    events = await generate(platform, negative_prompt="nsfw, nude woman")
    assert events[-1].generation.images[0].content_rating == GENERAL


async def test_uploads_are_rated_by_what_is_said_of_them(
    platform: Platform, painter: Painter
) -> None:
    harmless = await upload(platform, png(PICTURE), "a shirt")
    rated = await upload(platform, png(PICTURE[::-1]), "a naked man")
    assert (harmless.content_rating, rated.content_rating) == (GENERAL, RESTRICTED)
    for kind in ("redesign", "upscale"):
        error = await refused(platform, **{kind: {"image": rated.name}})
        assert (error.reason, error.metadata["field"]) == ("RESTRICTED_CONTENT", f"{kind}.image")
    error = await refused(platform, prompt="", redesign={"image": rated.name})
    assert error.reason == "RESTRICTED_CONTENT"
    assert not painter.requests


async def test_a_rating_only_goes_up(platform: Platform, painter: Painter) -> None:
    image = await upload(platform, png(PICTURE))
    assert image.content_rating == GENERAL
    for prompt in ("a naked man", "", "a shirt"):
        again = await upload(platform, png(PICTURE), prompt)
        assert (again.name, again.content_rating) == (image.name, RESTRICTED)
    error = await refused(platform, redesign={"image": image.name})
    assert error.reason == "RESTRICTED_CONTENT"


async def test_a_mask_for_adults_is_refused_too(platform: Platform, painter: Painter) -> None:
    image = await upload(platform, png(PICTURE))
    mask = await upload(platform, png(255 - PICTURE), "a naked man")
    error = await refused(platform, inpaint={"image": image.name, "mask": mask.name})
    assert (error.reason, error.metadata["field"]) == ("RESTRICTED_CONTENT", "inpaint.mask")
    assert not painter.requests


async def test_a_source_that_nobody_described_is_judged_by_its_caption(
    platform: Platform, painter: Painter
) -> None:
    platform.models.caption = "a nude woman on a white background"
    image = await upload(platform, png(PICTURE))
    error = await refused(platform, prompt="", redesign={"image": image.name})
    assert error.reason == "RESTRICTED_CONTENT"
    assert not painter.requests


class TestAllowed:
    @pytest.fixture
    def settings(self) -> dict[str, Any]:
        return {"restricted_content": "allow"}

    async def test_images_are_rated_one_by_one(self, platform: Platform, painter: Painter) -> None:
        events = await generate(platform, prompt="a {dress|nude woman}", count=20)
        images = events[-1].generation.images
        assert {image.prompt: image.content_rating for image in images} == {
            "a dress": GENERAL,
            "a nude woman": RESTRICTED,
        }

    async def test_what_is_made_of_it_is_too(self, platform: Platform, painter: Painter) -> None:
        source = await upload(platform, png(PICTURE), "nsfw")
        events = await generate(platform, redesign={"image": source.name})
        image = events[-1].generation.images[0]
        assert (image.prompt, image.content_rating) == ("a red dress", RESTRICTED)
        read = stub(platform).GetImage(generate_pb2.GetImageRequest(name=image.name))
        assert (await read).image.content_rating == RESTRICTED
        listed = stub(platform).ListImages(generate_pb2.ListImagesRequest(parent=PARENT))
        assert {i.content_rating for i in (await listed).images} == {RESTRICTED}

    async def test_its_bytes_come_back_as_what_they_are(
        self, platform: Platform, painter: Painter
    ) -> None:
        events = await generate(platform, prompt="a nude woman")
        data = await download(platform, events[-1].generation.images[0].name)
        assert (await upload(platform, data)).content_rating == RESTRICTED

    async def test_what_a_mask_for_adults_made_is_rated(
        self, platform: Platform, painter: Painter
    ) -> None:
        image = await upload(platform, png(PICTURE))
        mask = await upload(platform, png(255 - PICTURE), "a naked man")
        events = await generate(platform, inpaint={"image": image.name, "mask": mask.name})
        assert events[-1].generation.images[0].content_rating == RESTRICTED
