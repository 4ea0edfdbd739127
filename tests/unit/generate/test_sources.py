"""Drawings that start from an image: redesigns, inpainting, upscaling."""

import io
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from servers.generating import (
    Painter,
    count,
    download,
    ended,
    generate,
    kinds,
    refused,
    stub,
    upload,
)
from servers.platform import PARENT, PROJECT, Platform, garment
from toile.core.catalog.models import GenerationRow, ImageRow
from toile.core.context import current
from toile.core.errors import (
    ComputeUnavailableError,
    ToileError,
)
from toile.core.rpc.mapping import from_rpc_error
from toile.generate.records import GenerationRecords
from toile.imaging import formats
from toile.imaging.colours import rgb_to_lab
from toile.v1 import common_pb2, generate_pb2

RED = (206, 32, 40)


def noise(height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 255, (height, width, 3), np.uint8)


def mask_of(box: tuple[int, int, int, int], height: int = 96, width: int = 128) -> np.ndarray:
    """White within left, top, right, bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def last_image(events: list[generate_pb2.GenerateResponse]) -> common_pb2.Image:
    return events[-1].generation.images[-1]


async def pixels_of(platform: Platform, image: common_pb2.Image) -> np.ndarray:
    data = await download(platform, image.name)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def sent(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


async def test_a_redesign_starts_from_its_source(platform: Platform, painter: Painter) -> None:
    source = platform.add_image(garment(RED, size=(300, 200)), prompt="a red shirt")
    events = await generate(platform, redesign={"image": source}, count=2)

    asked = painter.requests[0]
    assert asked.strength == pytest.approx(0.6)
    assert (asked.width, asked.height) == (160, 104)
    assert sent(asked.init_image).shape == (104, 160, 3)
    assert not asked.mask_image
    assert not asked.HasField("upscale")
    assert asked.prompt == "a red dress"
    for image in events[-1].generation.images:
        assert image.parent_image == source
        assert (image.width, image.height) == (160, 104)
    said = formats.read(await download(platform, last_image(events).name))
    assert said.parameters is not None
    assert said.parameters.extra["Denoising strength"] == "0.6"


async def test_lineage_follows_a_redesign_to_its_source(
    platform: Platform, painter: Painter
) -> None:
    source = platform.add_image(garment(RED))
    first = last_image(await generate(platform, redesign={"image": source}))
    second = last_image(await generate(platform, redesign={"image": first.name}))
    request = generate_pb2.GetImageLineageRequest(name=second.name)
    lineage = await stub(platform).GetImageLineage(request)
    assert [image.name for image in lineage.images] == [second.name, first.name, source]


async def test_without_a_prompt_the_sources_own_is_used(
    platform: Platform, painter: Painter
) -> None:
    source = platform.add_image(garment(RED), prompt="a red shirt")
    events = await generate(platform, prompt="", redesign={"image": source})
    assert painter.requests[0].prompt == last_image(events).prompt == "a red shirt"
    assert events[-1].generation.request.prompt == "a red shirt"
    assert not platform.models.calls["DescribeImage"]


async def test_a_source_without_a_prompt_is_described(platform: Platform, painter: Painter) -> None:
    platform.models.caption = "a shirt (red)"
    source = platform.add_image(garment(RED))
    events = await generate(platform, prompt=" ", redesign={"image": source}, request_id="one")
    assert events[-1].generation.request.prompt == r"a shirt \(red\)"
    assert painter.requests[0].prompt == r"a shirt \(red\)"
    again = await generate(platform, prompt=" ", redesign={"image": source}, request_id="one")
    assert again[-1] == events[-1]
    assert platform.models.calls["DescribeImage"] == 1


async def test_an_empty_caption_is_no_prompt(platform: Platform, painter: Painter) -> None:
    platform.models.caption = ""
    source = platform.add_image(garment(RED))
    assert (await refused(platform, prompt="", redesign={"image": source})).reason == "EMPTY_PROMPT"
    assert count(platform, GenerationRow) == 0


async def test_a_source_is_cut_to_the_size_that_is_asked_for(
    platform: Platform, painter: Painter
) -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255
    source = platform.add_image(pixels)
    await generate(platform, redesign={"image": source}, width=128, height=128)
    assert (sent(painter.requests[0].init_image) > 200).all()


async def test_inpainting_changes_the_mask_and_nothing_else(
    platform: Platform, painter: Painter
) -> None:
    before = noise()
    fields = {
        "image": platform.add_image(before),
        "mask": platform.add_image(mask_of((32, 32, 96, 64))),
        "mask_blur": 8,
    }
    image = last_image(await generate(platform, inpaint=fields))
    after = await pixels_of(platform, image)

    assert after.shape == before.shape
    changed = (after != before).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (28, 67, 28, 99)
    assert changed[40:56, 40:88].mean() > 0.95
    assert image.parent_image == fields["image"]
    asked = painter.requests[0]
    assert asked.strength == pytest.approx(0.8)
    assert (asked.width, asked.height) == (144, 112)
    assert sent(asked.mask_image).shape == sent(asked.init_image).shape == (112, 144, 3)
    assert sent(asked.mask_image)[:, :, 0][56, 72] == 255


async def test_a_hard_mask_changes_its_own_pixels_only(
    platform: Platform, painter: Painter
) -> None:
    before, mask = noise(), mask_of((32, 32, 96, 64))
    fields = {"image": platform.add_image(before), "mask": platform.add_image(mask)}
    image = last_image(await generate(platform, inpaint={**fields, "mask_blur": 0}))
    after = await pixels_of(platform, image)
    outside = mask[..., 0] == 0
    assert (after[outside] == before[outside]).all()
    assert (after[~outside] != before[~outside]).any(axis=1).mean() > 0.95


async def test_white_strokes_on_nothing_are_a_mask(platform: Platform, painter: Painter) -> None:
    before = noise()
    strokes = Image.new("RGBA", (128, 96), (0, 0, 0, 0))
    strokes.paste("white", (32, 32, 96, 64))
    buffer = io.BytesIO()
    strokes.save(buffer, "PNG")
    mask = await upload(platform, buffer.getvalue())
    fields = {"image": platform.add_image(before), "mask": mask.name, "mask_blur": 0}
    after = await pixels_of(platform, last_image(await generate(platform, inpaint=fields)))
    changed = (after != before).any(axis=2)
    assert not changed[:32].any()
    assert changed[32:64, 32:96].mean() > 0.95


async def test_with_padding_only_the_region_is_drawn(platform: Platform, painter: Painter) -> None:
    before = noise(512, 512)
    mask = mask_of((200, 200, 264, 264), 512, 512)
    fields = {
        "image": platform.add_image(before),
        "mask": platform.add_image(mask),
        "padding": 32,
        "mask_blur": 0,
    }
    image = last_image(await generate(platform, inpaint=fields))
    asked = painter.requests[0]
    assert (asked.width, asked.height) == (128, 128)
    assert (sent(asked.init_image) == before[168:296, 168:296]).all()
    after = await pixels_of(platform, image)
    assert (image.width, image.height) == (512, 512)
    assert (after[200:264, 200:264] == 255 - before[200:264, 200:264]).all()


async def test_an_expansion_is_drawn_without_a_mask(platform: Platform, painter: Painter) -> None:
    before = noise()
    expansion = {"left": 16, "top": 8, "right": 0, "bottom": 24}
    fields = {"image": platform.add_image(before), "expansion": expansion, "mask_blur": 0}
    image = last_image(await generate(platform, inpaint=fields))
    after = await pixels_of(platform, image)
    assert (image.width, image.height) == (144, 128)
    assert (after[8:104, 16:144] == before).all()
    mask = sent(painter.requests[0].mask_image)[..., 0]
    assert mask[0, 0] == 255
    assert mask[64, 100] == 0


async def test_what_is_drawn_over_can_be_prepared(platform: Platform, painter: Painter) -> None:
    before = np.full((128, 128, 3), RED, np.uint8)
    fields = {
        "image": platform.add_image(before),
        "mask": platform.add_image(mask_of((32, 32, 96, 96), 128, 128)),
    }
    for name, grey in (("GREYSCALE", True), ("BLUR", False), ("FILL", False)):
        preparation = f"INPAINT_PREPARATION_{name}"
        await generate(platform, inpaint={**fields, "preparation": preparation})
        centre = sent(painter.requests[-1].init_image)[64, 64]
        assert (np.ptp(centre) == 0) == grey
        assert tuple(sent(painter.requests[-1].init_image)[8, 8]) == RED


async def test_colours_can_be_given_back(platform: Platform, painter: Painter) -> None:
    before = np.full((128, 128, 3), (150, 110, 100), np.uint8)
    fields = {
        "image": platform.add_image(before),
        "mask": platform.add_image(mask_of((32, 32, 96, 96), 128, 128)),
        "restore_colours": True,
    }
    image = last_image(await generate(platform, inpaint=fields))
    lab, old = rgb_to_lab(await pixels_of(platform, image)), rgb_to_lab(before)
    assert np.abs(lab - old)[64, 64, 1:].max() < 2
    assert np.abs(lab - old)[64, 64, 0] > 5


async def test_a_palette_stays_within_the_mask(platform: Platform, painter: Painter) -> None:
    before, mask = noise(), mask_of((32, 32, 96, 64))
    fields = {
        "image": platform.add_image(before),
        "mask": platform.add_image(mask),
        "mask_blur": 0,
    }
    palette = {"colours": ["#ff0000", "#0000ff"]}
    after = await pixels_of(
        platform, last_image(await generate(platform, inpaint=fields, palette=palette))
    )
    inside = mask[..., 0] > 0
    assert {tuple(p) for p in after[inside]} == {(255, 0, 0), (0, 0, 255)}
    assert (after[~inside] == before[~inside]).all()


async def test_upscaling_asks_for_tiles(platform: Platform, painter: Painter) -> None:
    before = noise(100, 133)
    source = platform.add_image(before)
    image = last_image(await generate(platform, upscale={"image": source}))
    asked = painter.requests[0]
    assert (asked.width, asked.height) == (image.width, image.height) == (264, 200)
    assert (sent(asked.init_image) == before).all()
    assert asked.upscale.overlap == 32
    assert asked.strength == pytest.approx(0.3)
    assert image.parent_image == source
    fields = {"image": source, "factor": 3.5, "overlap": 8, "strength": 0.5}
    await generate(platform, upscale=fields, width=464, height=352)
    asked = painter.requests[1]
    assert (asked.width, asked.height, asked.upscale.overlap) == (464, 352, 8)


async def test_a_tile_that_is_enlarged_still_repeats(platform: Platform, painter: Painter) -> None:
    source = platform.add_image(noise(100, 132))
    fields = {"upscale": {"image": source}, "repeat": "REPEAT_HALF_DROP"}
    image = last_image(await generate(platform, **fields))
    assert (image.width, image.height) == (264, 192)  # half of it is a whole number of latents
    assert painter.requests[0].repeat == common_pb2.REPEAT_HALF_DROP
    assert image.HasField("seam_score")


async def test_the_other_calls_only_fill_the_source_in(
    platform: Platform, painter: Painter
) -> None:
    drawing = {"parent": PARENT, "prompt": "a red dress", "seed": 7, "request_id": "one"}
    image = platform.add_image(noise())
    mask = platform.add_image(mask_of((32, 32, 96, 64)))
    services = stub(platform)
    calls = [
        (services.Redesign, generate_pb2.RedesignRequest, "redesign", {}),
        (services.RedesignWithPrompt, generate_pb2.RedesignWithPromptRequest, "redesign", {}),
        (services.Inpaint, generate_pb2.InpaintRequest, "inpaint", {"mask": mask}),
        (services.Upscale, generate_pb2.UpscaleRequest, "upscale", {}),
    ]
    for number, (method, kind, field, more) in enumerate(calls):
        source = {"image": image, **more}
        own = {**drawing, "request_id": f"request-{field}"}
        request = kind(drawing=own, **{field: source})
        events = [response.event async for response in method(request)]
        assert kinds(events)[-2:] == ["image", "generation"], method
        assert events[-1].generation.request.WhichOneof("source") == field
        by_generate = await generate(platform, **{**own, field: source})
        assert by_generate[-1] == events[-1], number
    assert len(painter.requests) == 3  # the same request by another call is the same request


async def asking(method: Any, request: Any) -> ToileError:
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in method(request):
            pass
    return from_rpc_error(caught.value)


async def test_two_sources_are_one_too_many(platform: Platform, painter: Painter) -> None:
    image = platform.add_image(noise())
    drawing = {"parent": PARENT, "prompt": "x", "upscale": {"image": image}}
    request = generate_pb2.RedesignRequest(drawing=drawing, redesign={"image": image})
    error = await asking(stub(platform).Redesign, request)
    assert (error.reason, error.metadata["field"]) == ("TWO_SOURCES", "drawing.upscale")
    assert not painter.requests


async def test_a_redesign_with_a_prompt_needs_one(platform: Platform, painter: Painter) -> None:
    image = platform.add_image(noise(), prompt="a red shirt")
    request = generate_pb2.RedesignWithPromptRequest(
        drawing={"parent": PARENT}, redesign={"image": image}
    )
    error = await asking(stub(platform).RedesignWithPrompt, request)
    assert error.reason == "EMPTY_PROMPT"
    assert not painter.requests


async def test_a_redesign_goes_on_after_a_failure(platform: Platform, painter: Painter) -> None:
    source = platform.add_image(noise())
    fields = {"redesign": {"image": source}, "count": 3, "request_id": "one"}
    painter.fail_after = (1, ComputeUnavailableError("the models do not answer"))
    await refused(platform, **fields)
    assert len((await ended(platform)).images) == 1
    painter.fail_after = None
    events = await generate(platform, **fields)
    assert [image.parent_image for image in events[-1].generation.images] == [source] * 3
    assert list(painter.requests[1].seeds) == [8, 9]
    assert painter.requests[1].init_image == painter.requests[0].init_image


async def test_a_finished_redesign_is_replayed_without_its_source(
    platform: Platform, painter: Painter
) -> None:
    source = platform.add_image(noise())
    events = await generate(platform, redesign={"image": source}, request_id="one")
    with platform.catalog.transaction() as session:
        session.delete(session.get_one(ImageRow, source))
    again = await generate(platform, redesign={"image": source}, request_id="one")
    assert again[-1] == events[-1]


async def test_a_wrapped_request_belongs_to_its_project(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def find(records: GenerationRecords, request: generate_pb2.GenerateRequest) -> None:
        seen.append(current().project)

    monkeypatch.setattr(GenerationRecords, "find", find)
    image = platform.add_image(noise())
    request = generate_pb2.UpscaleRequest(
        drawing={"parent": PARENT, "prompt": "x"}, upscale={"image": image}
    )
    async for _ in stub(platform).Upscale(request):
        pass
    assert seen == [PROJECT]
