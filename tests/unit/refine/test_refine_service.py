import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import func, select

from servers.platform import (
    MODEL_VERSION,
    NATIVE_SIZE,
    PARENT,
    Platform,
    garment,
    running_platform,
)
from toile.core.catalog.models import (
    GenerationAdapterRow,
    ImageRow,
    ModelVersionRow,
    RefinementRow,
)
from toile.core.errors import ComputeUnavailableError, ExhaustedError, ToileError
from toile.core.rpc.mapping import from_rpc_error
from toile.imaging import png
from toile.imaging.colours import dominant_colour, nearest_colour_name
from toile.refine.__main__ import build_service
from toile.v1 import common_pb2, refine_pb2, refine_pb2_grpc

RED, BLUE = (206, 32, 40), (38, 94, 204)


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with running_platform(tmp_path, build_service) as running:
        yield running


def stub(platform: Platform) -> Any:
    return refine_pb2_grpc.RefineServiceStub(platform.channel)


async def refine(platform: Platform, **fields: Any) -> list[refine_pb2.RefineImageResponse]:
    request = refine_pb2.RefineImageRequest(**{"instruction": "make it blue", **fields})
    try:
        return [event async for event in stub(platform).RefineImage(request)]
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def refused(platform: Platform, **fields: Any) -> ToileError:
    with pytest.raises(ToileError) as caught:
        await refine(platform, **fields)
    return caught.value


def stored(platform: Platform, image: str) -> bytes:
    with platform.catalog.reading() as session:
        return platform.store.get(session.get_one(ImageRow, image).artifact)


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rows(platform: Platform, table: Any) -> int:
    with platform.catalog.reading() as session:
        return int(session.scalar(select(func.count()).select_from(table)) or 0)


def assert_untouched(platform: Platform, *, images: int) -> None:
    """Nothing was added to the catalog or the store but the images the test put there."""
    assert rows(platform, RefinementRow) == 0
    assert rows(platform, ImageRow) == images
    assert len(list(platform.store.list(f"{PARENT}/images/"))) == images


async def test_make_it_blue_changes_the_garment_and_nothing_else(platform: Platform) -> None:
    before = garment(RED)
    image = platform.add_image(before, prompt="a red shirt on a white background")

    events = await refine(platform, image=image, seed=7)

    plan = events[0].plan
    assert (plan.operation, plan.region, plan.value) == ("colour", "garment", "blue")
    assert plan.prompt == "a blue shirt on a white background"
    steps = [event.step for event in events if event.HasField("step")]
    assert [step.step for step in steps] == [1, 2, 3]
    refinement = events[-1].refinement
    after = pixels_of(stored(platform, refinement.image.name))
    assert after.shape == before.shape
    cloth = np.abs(before.astype(int) - before[0, 0]).max(axis=2) > 60
    assert nearest_colour_name(dominant_colour(after, cloth)) == "blue"
    far = ~np.asarray(
        [
            [cloth[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].any() for x in range(96)]
            for y in range(96)
        ]
    )
    assert (after[far] == before[far]).all()
    changed = (after != before).any(axis=2)
    assert plan.region_share == pytest.approx(cloth.mean(), abs=0.06)
    assert changed.mean() <= plan.region_share


async def test_only_the_named_part_changes(platform: Platform) -> None:
    before = garment(RED)
    image = platform.add_image(before, prompt="a red shirt")
    events = await refine(platform, image=image, instruction="Make the sleeves blue, please")
    assert events[0].plan.region == "sleeves"
    after = pixels_of(stored(platform, events[-1].refinement.image.name))
    assert (after[:, 24:72] == before[:, 24:72]).all()
    sleeves = np.zeros((96, 96), dtype=bool)
    sleeves[18:46, 10:22] = True
    assert nearest_colour_name(dominant_colour(after, sleeves)) == "blue"


async def test_the_background_can_be_changed(platform: Platform) -> None:
    before = garment(RED)
    image = platform.add_image(before, prompt="a red shirt on a white background")
    events = await refine(platform, image=image, instruction="turn the background green")
    assert events[0].plan.prompt == "a red shirt on a green background"
    after = pixels_of(stored(platform, events[-1].refinement.image.name))
    assert nearest_colour_name(dominant_colour(after[:10])) == "green"
    assert (after[20:40, 30:60] == before[20:40, 30:60]).all()


async def test_the_result_is_a_record_with_its_lineage(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    refinement = (await refine(platform, image=image, seed=11))[-1].refinement

    assert refinement.source_image == refinement.image.parent_image == image
    assert refinement.image.origin == common_pb2.IMAGE_ORIGIN_REFINED
    assert refinement.image.producer == refinement.name
    assert refinement.image.prompt == "a blue shirt"
    assert refinement.image.seed == 11
    data = stored(platform, refinement.image.name)
    assert len(data) == refinement.image.size_bytes
    metadata = png.read(data)
    assert metadata.parameters is not None
    assert metadata.parameters.prompt == "a blue shirt"
    assert metadata.parameters.seed == 11
    assert (metadata.parameters.width, metadata.parameters.height) == (96, 96)
    assert metadata.toile is not None
    assert metadata.toile["instruction"] == "make it blue"
    assert metadata.toile["source_image"] == image
    assert metadata.toile["image"] == refinement.image.name
    assert metadata.toile["plan"]["region"] == "garment"

    found = await stub(platform).GetRefinement(
        refine_pb2.GetRefinementRequest(name=refinement.name)
    )
    assert found.refinement == refinement
    second = (await refine(platform, image=refinement.image.name, instruction="make it red"))[-1]
    page = await stub(platform).ListRefinements(
        refine_pb2.ListRefinementsRequest(parent=PARENT, page_size=1)
    )
    assert [one.name for one in page.refinements] == [second.refinement.name]
    rest = await stub(platform).ListRefinements(
        refine_pb2.ListRefinementsRequest(parent=PARENT, page_token=page.next_page_token)
    )
    assert [one.name for one in rest.refinements] == [refinement.name]


async def test_what_drew_the_image_draws_its_refinements(platform: Platform) -> None:
    platform.add_dataset(garment(RED))
    generation = platform.add_generation(weight=0.7)
    image = platform.add_image(garment(RED), prompt="a red shirt", producer=generation)

    first = (await refine(platform, image=image))[-1].refinement
    again = await refine(platform, image=first.image.name, instruction="make it red")

    for request in platform.models.requests:
        assert request.base_artifact == "bases/other/0123"
        assert [(a.artifact, a.weight) for a in request.adapters] == [
            ("projects/studio/models/lace/versions/1/job", 0.7)
        ]
    with platform.catalog.reading() as session:
        row = session.get(GenerationAdapterRow, (again[-1].refinement.name, MODEL_VERSION))
        assert row is not None
        assert row.weight == 0.7


async def test_a_controlnet_that_drew_the_image_does_not_draw_its_refinements(
    platform: Platform,
) -> None:
    platform.add_dataset(garment(RED))
    generation = platform.add_generation(weight=0.7)
    with platform.catalog.transaction() as session:
        session.get_one(ModelVersionRow, MODEL_VERSION).adapter_type = "controlnet"
    image = platform.add_image(garment(RED), prompt="a red shirt", producer=generation)
    refined = (await refine(platform, image=image))[-1].refinement
    assert not platform.models.requests[0].adapters
    with platform.catalog.reading() as session:
        assert session.get(GenerationAdapterRow, (refined.name, MODEL_VERSION)) is None


async def test_an_upload_without_a_prompt_is_described_first(platform: Platform) -> None:
    image = platform.add_image(garment((46, 142, 66)))
    platform.models.caption = "a green shirt on a white background"
    events = await refine(platform, image=image, instruction="make it striped")
    assert events[0].plan.prompt == "a green striped shirt on a white background"
    assert platform.models.calls["DescribeImage"] == 1


async def test_operations_have_strengths_of_their_own(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    for instruction in ("make it blue", "make it striped", "make it denim"):
        await refine(platform, image=image, instruction=instruction)
    colour, pattern, material = (request.strength for request in platform.models.requests)
    assert colour < min(pattern, material)
    await refine(platform, image=image, strength=0.3, steps=1)
    last = platform.models.requests[-1]
    assert last.strength == 0.3
    assert int(last.steps * last.strength) >= 1


@pytest.mark.parametrize("size", [(1000, 331), (331, 1000), (50, 50), (129, 127), (16, 400)])
async def test_any_size_keeps_its_shape_and_its_outside(
    platform: Platform, size: tuple[int, int]
) -> None:
    before = garment(RED, size=size)
    image = platform.add_image(before, prompt="a red shirt")
    events = await refine(platform, image=image)
    request = platform.models.requests[-1]
    assert request.width % 8 == request.height % 8 == 0
    assert max(request.width, request.height) <= 2 * NATIVE_SIZE
    after = pixels_of(stored(platform, events[-1].refinement.image.name))
    assert after.shape == before.shape
    margin = max(1, size[1] // 6 - max(3, round(0.012 * max(size))))
    assert (after[:margin] == before[:margin]).all()
    cloth = np.abs(before.astype(int) - before[0, 0]).max(axis=2) > 60
    assert nearest_colour_name(dominant_colour(after, cloth)) == "blue"


async def test_a_repeated_request_gets_the_first_answer(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    first = await refine(platform, image=image, request_id="r1")
    second = await refine(platform, image=image, request_id="r1")
    assert second[-1].refinement == first[-1].refinement
    assert second[0].plan == first[0].plan
    assert platform.models.calls["Diffuse"] == 1
    error = await refused(platform, image=image, instruction="make it red", request_id="r1")
    assert error.reason == "REQUEST_ID_REUSED"


async def test_equal_requests_at_the_same_time_make_one_refinement(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    answers = await asyncio.gather(
        *(refine(platform, image=image, request_id="same") for _ in range(3))
    )
    assert len({answer[-1].refinement.name for answer in answers}) == 1
    assert rows(platform, RefinementRow) == 1
    assert len(list(platform.store.list(f"{PARENT}/images/"))) == 2


async def test_a_client_that_goes_away_stops_the_drawing_and_leaves_nothing(
    platform: Platform,
) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    platform.models.gate = asyncio.Event()
    call = stub(platform).RefineImage(
        refine_pb2.RefineImageRequest(image=image, instruction="make it blue", request_id="a")
    )
    while not (await call.read()).HasField("step"):
        pass
    call.cancel()
    await asyncio.wait_for(platform.models.cancelled.wait(), 10)
    assert_untouched(platform, images=1)

    platform.models.gate = None
    events = await refine(platform, image=image, request_id="a")
    assert events[-1].HasField("refinement")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": "do a backflip"}, "INSTRUCTION_NOT_UNDERSTOOD"),
        ({"instruction": ""}, "INSTRUCTION_NOT_UNDERSTOOD"),
        ({"instruction": "make it red and blue"}, "INSTRUCTION_AMBIGUOUS"),
        ({"instruction": "blue " * 2000}, "INSTRUCTION_TOO_LONG"),
        ({"image": "shirt.png"}, "BAD_RESOURCE_NAME"),
        ({"image": f"{PARENT}/images/none"}, "NOT_FOUND"),
        ({"strength": 0.0}, "OUT_OF_RANGE"),
        ({"strength": 1.5}, "OUT_OF_RANGE"),
        ({"strength": float("nan")}, "OUT_OF_RANGE"),
        ({"strength": 1e-9}, "OUT_OF_RANGE"),
        ({"steps": -1}, "OUT_OF_RANGE"),
        ({"steps": 10_000}, "OUT_OF_RANGE"),
        ({"seed": -1}, "OUT_OF_RANGE"),
        ({"request_id": "x" * 200}, "INVALID_ARGUMENT"),
    ],
)
async def test_a_wrong_request_is_refused_before_it_costs_anything(
    platform: Platform, fields: dict[str, Any], reason: str
) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    assert (await refused(platform, **{"image": image, **fields})).reason == reason
    assert not platform.models.calls
    assert_untouched(platform, images=1)


async def test_a_region_that_is_not_there_is_refused_with_those_that_are(
    platform: Platform,
) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    for instruction in ("make the collar red", "make the legs red"):
        error = await refused(platform, image=image, instruction=instruction)
        assert error.reason == "REGION_NOT_FOUND"
        assert {"garment", "body", "sleeves", "background"} == set(
            error.metadata["regions"].split(",")
        )
    blank = platform.add_image(np.full((96, 96, 3), 240, dtype=np.uint8), prompt="nothing")
    error = await refused(platform, image=blank)
    assert error.metadata["regions"] == "background"
    assert platform.models.calls["Diffuse"] == 0


@pytest.mark.parametrize("method", ["SegmentImage", "DescribeImage", "Diffuse"])
@pytest.mark.parametrize("error", [ComputeUnavailableError("gone"), ExhaustedError("busy")])
async def test_models_that_fail_leave_nothing(
    platform: Platform, method: str, error: ToileError
) -> None:
    image = platform.add_image(garment(RED))
    platform.models.errors[method] = error
    assert type(await refused(platform, image=image)) is type(error)
    assert_untouched(platform, images=1)


async def test_models_that_end_without_a_drawing(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    platform.models.no_drawing = True
    assert type(await refused(platform, image=image)) is ComputeUnavailableError
    assert_untouched(platform, images=1)


async def test_a_store_that_goes_away_while_drawing(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    folder = platform.settings.home_path / "artifacts"
    platform.models.gate = asyncio.Event()
    running = asyncio.create_task(refine(platform, image=image))
    await asyncio.wait_for(platform.models.drawing.wait(), 30)
    folder.rename(folder.with_name("away"))
    platform.models.gate.set()
    with pytest.raises(ToileError) as caught:
        await running
    assert caught.value.reason == "STORE_UNAVAILABLE"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(folder.with_name("remains"))
    folder.with_name("away").rename(folder)
    assert_untouched(platform, images=1)


async def test_a_damaged_source_is_told_from_a_missing_one(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red shirt")
    with platform.catalog.reading() as session:
        key = session.get_one(ImageRow, image).artifact
    platform.store.put(key, b"not a picture")
    assert (await refused(platform, image=image)).reason == "DATA_LOSS"


async def test_an_unknown_refinement_is_not_found(platform: Platform) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await stub(platform).GetRefinement(
            refine_pb2.GetRefinementRequest(name=f"{PARENT}/refinements/a")
        )
    assert from_rpc_error(caught.value).reason == "NOT_FOUND"
