"""What a request says beside its prompt, and what becomes of it."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from servers.generating import Painter, download, generate, kinds, refused, stub
from servers.platform import Platform, png
from toile.generate import convert
from toile.imaging import formats
from toile.imaging.palette import parse_colour
from toile.v1 import common_pb2, generate_pb2, inference_pb2


def images(events: list[generate_pb2.GenerateResponse]) -> list[common_pb2.Image]:
    return [event.image for event in events if event.HasField("image")]


def resolved(events: list[generate_pb2.GenerateResponse]) -> generate_pb2.GenerateRequest:
    return events[-1].generation.request


async def pixels_of(platform: Platform, image: common_pb2.Image) -> np.ndarray:
    data = await download(platform, image.name)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


async def test_seeds_may_be_given_one_by_one(platform: Platform, painter: Painter) -> None:
    events = await generate(platform, seed=None, seeds=[40, 3, 40])
    assert [image.seed for image in images(events)] == [40, 3, 40]
    assert list(painter.requests[0].seeds) == [40, 3, 40]
    assert resolved(events).count == 3
    assert (await refused(platform, seed=None, seeds=[1, 2], count=3)).metadata["field"] == "seeds"
    assert (await refused(platform, seed=1, seeds=[1, 2])).metadata["field"] == "seeds"
    assert (await refused(platform, seed=None, seeds=[-1])).metadata["field"] == "seeds"
    assert (await refused(platform, seed=None, seeds=[1] * 65)).metadata["field"] == "seeds"


async def test_a_resolved_request_can_be_sent_again(platform: Platform, painter: Painter) -> None:
    first = resolved(await generate(platform, aspect_ratio="3:4", palette={"colours": ["red"]}))
    again = [event async for event in stub(platform).Generate(first)]
    assert resolved(again) == first


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("1:1", (128, 128)),
        ("3:4", (112, 144)),
        ("16:9", (168, 96)),
        ("1:4", (64, 256)),
        ("1.91:1", (176, 96)),
    ],
)
async def test_an_aspect_ratio_keeps_the_bases_area(
    platform: Platform, painter: Painter, ratio: str, size: tuple[int, int]
) -> None:
    events = await generate(platform, aspect_ratio=ratio)
    assert (painter.requests[0].width, painter.requests[0].height) == size
    assert (images(events)[0].width, images(events)[0].height) == size


@pytest.mark.parametrize(
    ("fields", "reason", "field", "nearest"),
    [
        ({"width": 130}, "BAD_SIZE", "width", "128x128"),
        ({"width": 133, "height": 96}, "BAD_SIZE", "width", "136x96"),
        ({"height": 8}, "BAD_SIZE", "height", "128x64"),
        ({"width": 4096, "height": 9}, "BAD_SIZE", "width", "256x64"),
        ({"aspect_ratio": "1:9"}, "BAD_SIZE", "aspect_ratio", "64x256"),
        ({"height": 72, "repeat": "REPEAT_HALF_DROP"}, "BAD_SIZE", "height", "128x64"),
        ({"width": 120, "repeat": "REPEAT_BRICK"}, "BAD_SIZE", "width", "128x128"),
        ({"aspect_ratio": "tall"}, "BAD_ASPECT_RATIO", "aspect_ratio", None),
        ({"aspect_ratio": "0:1"}, "BAD_ASPECT_RATIO", "aspect_ratio", None),
        ({"aspect_ratio": "3:4", "width": 128}, "INVALID_ARGUMENT", "aspect_ratio", None),
    ],
)
async def test_a_size_that_cannot_be_names_one_that_can(
    platform: Platform,
    painter: Painter,
    fields: dict[str, Any],
    reason: str,
    field: str,
    nearest: str | None,
) -> None:
    error = await refused(platform, **fields)
    assert (error.reason, error.metadata["field"]) == (reason, field)
    assert error.metadata.get("nearest") == nearest
    assert not painter.requests
    if nearest is not None:
        assert nearest in error.message
        width, height = map(int, nearest.split("x"))
        repeat = fields.get("repeat")
        await generate(platform, width=width, height=height, repeat=repeat)


async def test_repeats_are_asked_for_and_their_seams_measured(
    platform: Platform, painter: Painter
) -> None:
    async def ramp(request: inference_pb2.DiffuseRequest, context: Any) -> Any:
        painter.requests.append(request)
        row = np.linspace(0, 250, request.width)
        pixels = np.broadcast_to(row[None, :, None], (request.height, request.width, 3))
        yield inference_pb2.DiffuseResponse(image={"png": png(pixels.astype(np.uint8))})

    plain = images(await generate(platform))[0]
    assert not plain.HasField("seam_score")
    flat = images(await generate(platform, repeat="REPEAT_HALF_DROP", height=96))[0]
    assert painter.requests[-1].repeat == common_pb2.REPEAT_HALF_DROP
    assert flat.seam_score == 1
    platform.models.painter = ramp
    assert images(await generate(platform, repeat="REPEAT_STRAIGHT"))[0].seam_score > 10


async def test_a_palette_holds_the_images(platform: Platform, painter: Painter) -> None:
    navy, red = parse_colour("navy"), (255, 0, 0)
    (image,) = images(await generate(platform, seed=30, palette={"colours": ["navy", "#ff0000"]}))
    assert {tuple(p) for p in (await pixels_of(platform, image)).reshape(-1, 3)} <= {navy, red}
    part = {"colours": ["navy"], "strength": 0.5}
    (image,) = images(await generate(platform, seed=30, palette=part))
    (colour,) = {tuple(p) for p in (await pixels_of(platform, image)).reshape(-1, 3)}
    assert colour not in {(30, 30, 30), navy}


@pytest.mark.parametrize(
    ("name", "media_type", "suffix"),
    [
        ("IMAGE_FORMAT_PNG", "image/png", ".png"),
        ("IMAGE_FORMAT_WEBP", "image/webp", ".webp"),
        ("IMAGE_FORMAT_JPEG", "image/jpeg", ".jpg"),
    ],
)
async def test_every_format_says_how_it_was_made(
    platform: Platform, painter: Painter, name: str, media_type: str, suffix: str
) -> None:
    events = await generate(platform, count=2, output={"format": name})
    image = images(events)[1]
    data = await download(platform, image.name)
    said = formats.read(data)
    assert image.media_type == media_type
    assert (await pixels_of(platform, image)).shape == (128, 128, 3)
    assert said.parameters is not None
    assert (said.parameters.prompt, said.parameters.seed) == ("a red dress", 8)
    assert said.toile is not None
    assert said.toile["image"] == image.name
    assert next(platform.store.list("projects/")).key.endswith(suffix)


async def test_quality_is_for_lossy_formats(platform: Platform, painter: Painter) -> None:
    assert resolved(await generate(platform)).output.quality == 0
    webp = {"format": "IMAGE_FORMAT_WEBP"}
    assert resolved(await generate(platform, output=webp)).output.quality == 90
    for output in ({"quality": 50}, {**webp, "quality": 101}, {**webp, "quality": -1}):
        error = await refused(platform, output=output)
        assert error.metadata["field"] == "output.quality"


async def test_previews_pass_through(platform: Platform, painter: Painter) -> None:
    events = await generate(platform, count=2, preview_interval=3)
    assert kinds(events)[:4] == ["accepted", "step", "preview", "image"]
    assert painter.requests[0].preview_interval == 3
    previews = [event.preview for event in events if event.HasField("preview")]
    assert [(p.image_index, p.jpeg) for p in previews] == [(0, b"jpeg"), (1, b"jpeg")]
    assert "preview" not in kinds(await generate(platform))


async def test_what_is_passed_on_to_the_models(platform: Platform, painter: Painter) -> None:
    await generate(
        platform,
        guidance_rescale=0.7,
        priority="PRIORITY_BATCH",
        refiner={"mode": "REFINER_MODE_IMAGE_TO_IMAGE"},
    )
    asked = painter.requests[0]
    assert asked.guidance_rescale == 0.7
    assert asked.priority == common_pb2.PRIORITY_BATCH
    assert asked.refiner_mode == common_pb2.REFINER_MODE_IMAGE_TO_IMAGE
    assert asked.timeout_seconds == 0
    defaults = resolved(await generate(platform, refiner={}))
    assert defaults.priority == common_pb2.PRIORITY_INTERACTIVE
    assert defaults.refiner.mode == common_pb2.REFINER_MODE_SPLIT


async def test_the_prompts_of_wildcards_share_a_drawing(
    platform: Platform, painter: Painter
) -> None:
    lists = {"part": {"values": ["collar", "{long|short} sleeves"]}}
    events = await generate(
        platform, prompt="a {red|blue} (dress:1.2), __part__", count=12, wildcards=lists
    )
    told = images(events)
    prompts = [image.prompt for image in told]
    assert set(prompts) <= {
        f"a {colour} (dress:1.2), {part}"
        for colour in ("red", "blue")
        for part in ("collar", "long sleeves", "short sleeves")
    }
    (asked,) = painter.requests
    assert len(set(asked.prompts)) == len(set(prompts)) > 2
    assert list(asked.seeds) == list(range(7, 19))
    by_seed = dict(zip(asked.seeds, asked.prompts, strict=True))
    assert [by_seed[image.seed] for image in told] == prompts

    assert resolved(events).prompt == "a {red|blue} (dress:1.2), __part__"
    said = formats.read(await download(platform, told[0].name))
    assert said.parameters is not None
    assert said.parameters.prompt == prompts[0]
    assert said.toile is not None
    assert said.toile["prompt"] == prompts[0]
    assert "wildcards" not in said.toile["request"]
    assert "wildcards" in convert.request_to_json(resolved(events))


async def test_a_long_prompt_is_read_to_its_end(platform: Platform, painter: Painter) -> None:
    prompt = "red " * 300
    await generate(platform, prompt=prompt)
    assert painter.requests[0].prompt == prompt
