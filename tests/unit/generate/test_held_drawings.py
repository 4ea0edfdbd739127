"""Drawings whose structure ControlNets hold."""

import io
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from servers.controlled import (
    CONTROLNET,
    CONTROLNET_ARTIFACT,
    HELD_BASE,
    add_controlnets,
    add_held_base,
)
from servers.generating import Painter, add_adapter, call, download, generate, refused, stub
from servers.platform import MODEL_VERSION, PARENT, VERSION, Platform, garment
from toile.core.catalog.models import GenerationAdapterRow, ImageRow, ModelVersionRow
from toile.core.errors import ComputeUnavailableError
from toile.core.rpc.mapping import from_rpc_error
from toile.imaging import formats
from toile.imaging.control_maps import edge_map, part_map
from toile.v1 import common_pb2, generate_pb2

RED = (206, 32, 40)
SKETCH = garment(RED, size=(128, 128))
EDGES, PARTS, MAP, EDGES_PARTS = (
    generate_pb2.CONTROL_KIND_EDGES,
    generate_pb2.CONTROL_KIND_PARTS,
    generate_pb2.CONTROL_KIND_MAP,
    generate_pb2.CONTROL_KIND_EDGES_PARTS,
)


@pytest.fixture
def held(platform: Platform, painter: Painter) -> Platform:
    """The platform with a base that has a ControlNet for edges."""
    add_held_base(platform)
    return platform


@pytest.fixture
def trained(held: Platform) -> Platform:
    """The platform with ControlNets of its own, too."""
    add_adapter(held)
    add_controlnets(held)
    return held


async def draw(platform: Platform, *controls: Any, **fields: Any) -> generate_pb2.Generation:
    events = await generate(platform, base=HELD_BASE, controls=controls, **fields)
    return events[-1].generation


async def redraw(platform: Platform, image: str, **drawing: Any) -> generate_pb2.Generation:
    whole = {"parent": PARENT, "prompt": "in blue", "seed": 7, "base": HELD_BASE, **drawing}
    request = generate_pb2.RedesignWithPromptRequest(drawing=whole, redesign={"image": image})
    events = [answer.event async for answer in stub(platform).RedesignWithPrompt(request)]
    return events[-1].generation


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


async def test_the_edges_of_an_image_reach_the_models(held: Platform, painter: Painter) -> None:
    image = held.add_image(SKETCH)
    generation = await draw(held, {"image": image})
    (asked,) = painter.requests[0].controls
    assert (asked.artifact, asked.kind) == ("", "edges")
    assert (asked.scale, asked.start, asked.end) == (1.0, 0.0, 1.0)
    assert np.array_equal(pixels_of(asked.map_png), edge_map(SKETCH))
    assert pixels_of(asked.map_png).any()
    (said,) = generation.request.controls
    assert (said.image, said.kind, said.model) == (image, EDGES, "")
    assert (said.scale, said.start, said.end) == (1.0, 0.0, 1.0)
    assert not generation.images[0].parent_image


async def test_each_kind_has_its_own_map(trained: Platform, painter: Painter) -> None:
    image = trained.add_image(SKETCH)
    model = CONTROLNET.rpartition("/versions/")[0]
    with trained.catalog.transaction() as session:  # its newest is of another base
        session.delete(session.get_one(ModelVersionRow, f"{model}/versions/2"))
    controls = [
        {"image": image, "kind": kind, "model": model, "scale": 0.5, "start": 0.1, "end": 0.9}
        for kind in (EDGES, PARTS, MAP, EDGES_PARTS)
    ]
    generation = await draw(trained, *controls)
    edges, parts, whole, both = painter.requests[0].controls
    assert {one.artifact for one in painter.requests[0].controls} == {CONTROLNET_ARTIFACT}
    assert np.array_equal(pixels_of(edges.map_png), edge_map(SKETCH))
    colours = {tuple(colour) for colour in pixels_of(parts.map_png).reshape(-1, 3)}
    labels = part_map(np.arange(3, dtype=np.uint8)[None])[0]
    assert colours == {tuple(colour) for colour in labels}
    assert np.array_equal(pixels_of(whole.map_png), SKETCH)
    is_edge = edge_map(SKETCH) > 0
    drawn_over = np.where(is_edge, np.uint8(255), pixels_of(parts.map_png))
    assert np.array_equal(pixels_of(both.map_png), drawn_over)
    assert (whole.scale, whole.start, whole.end) == (0.5, 0.1, 0.9)
    assert [one.model for one in generation.request.controls] == [CONTROLNET] * 4


async def test_an_image_is_cut_to_the_drawing_before_its_map_is_made(
    held: Platform, painter: Painter
) -> None:
    wide = np.full((128, 256, 3), 255, np.uint8)
    wide[:, 64:192] = SKETCH
    await draw(held, {"image": held.add_image(wide)})
    assert np.array_equal(pixels_of(painter.requests[0].controls[0].map_png), edge_map(SKETCH))


async def test_a_redesign_by_a_prompt_holds_the_edges_of_its_source(
    held: Platform, painter: Painter
) -> None:
    source = held.add_image(SKETCH)
    generation = await redraw(held, source)
    (asked,) = painter.requests[0].controls
    assert (asked.kind, asked.scale) == ("edges", 0.7)
    assert np.array_equal(pixels_of(asked.map_png), edge_map(SKETCH))
    assert painter.requests[0].strength == pytest.approx(0.85)
    assert generation.request.controls[0].image == source
    assert generation.images[0].parent_image == source


@pytest.mark.parametrize(
    ("drawing", "scales", "strength"),
    [
        ({"controls": [{"scale": 1.5}]}, [1.5], 0.85),
        ({"controls": [{"scale": 0.0}]}, [], 0.6),
        ({"base": "bases/tiny"}, [], 0.6),
        ({"base": "bases/tiny", "controls": [{"scale": 0.0}]}, [], 0.6),
        ({"repeat": common_pb2.REPEAT_STRAIGHT}, [], 0.6),
    ],
)
async def test_it_holds_as_the_request_and_the_base_say(
    held: Platform,
    painter: Painter,
    drawing: dict[str, Any],
    scales: list[float],
    strength: float,
) -> None:
    generation = await redraw(held, held.add_image(SKETCH), **drawing)
    assert [control.scale for control in painter.requests[0].controls] == scales
    assert len(generation.request.controls) == len(scales)
    assert painter.requests[0].strength == pytest.approx(strength)


async def test_a_strength_that_is_said_counts(held: Platform, painter: Painter) -> None:
    source = held.add_image(SKETCH)
    await draw(held, {}, redesign={"image": source, "strength": 0.4})
    assert painter.requests[-1].strength == pytest.approx(0.4)
    await draw(held, {"image": held.add_image(SKETCH[::-1])}, redesign={"image": source})
    assert painter.requests[-1].strength == pytest.approx(0.6), "another image's edges hold"


async def test_variations_are_not_held(held: Platform, painter: Painter) -> None:
    await draw(held, redesign={"image": held.add_image(SKETCH)})
    assert not painter.requests[0].controls


async def test_what_was_drawn_can_be_asked_for_again(trained: Platform, painter: Painter) -> None:
    first = await redraw(trained, trained.add_image(SKETCH), request_id="one")
    assert await redraw(trained, first.request.redesign.image, request_id="one") == first
    assert len(painter.requests) == 1
    request = generate_pb2.GenerateRequest()
    request.CopyFrom(first.request)
    request.request_id = ""
    events = [event async for event in stub(trained).Generate(request)]
    again = events[-1].generation.request
    again.request_id = "one"
    assert again == first.request
    assert painter.requests[1] == painter.requests[0]


async def test_a_held_drawing_goes_on_after_a_failure(trained: Platform, painter: Painter) -> None:
    control = {"image": trained.add_image(SKETCH), "model": CONTROLNET, "kind": MAP}
    adapters = [{"model": MODEL_VERSION}]
    with trained.catalog.transaction() as session:
        session.get_one(ModelVersionRow, MODEL_VERSION).base = HELD_BASE
    fields = {"count": 2, "request_id": "one", "adapters": adapters}
    painter.fail_after = (1, ComputeUnavailableError("the models do not answer"))
    await refused(trained, base=HELD_BASE, controls=[control], **fields)
    painter.fail_after = None
    generation = await draw(trained, control, **fields)
    assert len(generation.images) == 2
    before, after = painter.requests
    assert after.controls == before.controls
    assert [one.artifact for one in after.adapters] == [one.artifact for one in before.adapters]
    assert len(after.adapters) == 1


async def test_a_finished_drawing_is_replayed_without_its_image(
    held: Platform, painter: Painter
) -> None:
    image = held.add_image(SKETCH)
    first = await draw(held, {"image": image}, request_id="one")
    await stub(held).DeleteImage(generate_pb2.DeleteImageRequest(name=image))
    assert await draw(held, {"image": image}, request_id="one") == first


async def test_an_image_is_kept_while_it_holds_a_drawing(held: Platform, painter: Painter) -> None:
    image = held.add_image(SKETCH)
    painter.pause_after = 0
    stream = call(held, base=HELD_BASE, controls=[{"image": image}])
    events = aiter(stream)
    await anext(events)
    await painter.begun.wait()
    with pytest.raises(grpc.RpcError) as caught:
        await stub(held).DeleteImage(generate_pb2.DeleteImageRequest(name=image))
    assert from_rpc_error(caught.value).reason == "IMAGE_IN_USE"
    painter.go_on.set()
    async for _ in events:
        pass


async def test_files_tell_of_the_controls(trained: Platform, painter: Painter) -> None:
    image = trained.add_image(SKETCH)
    generation = await draw(
        trained,
        {"image": image, "scale": 0.7},
        {"image": image, "kind": MAP, "model": CONTROLNET, "end": 0.5},
    )
    said = formats.read(await download(trained, generation.images[0].name))
    assert said.parameters is not None
    assert said.toile is not None
    own, version = said.toile["controls"]
    assert said.parameters.extra["ControlNet 0"] == (
        f"Module: canny, Model: edges [{own['digest'][:8]}], Weight: 0.7, "
        "Guidance Start: 0.0, Guidance End: 1.0"
    )
    assert said.parameters.extra["ControlNet 1"] == (
        "Module: none, Model: folds [11111111], Weight: 1.0, Guidance Start: 0.0, Guidance End: 0.5"
    )
    assert len(own["digest"]) == 64
    assert (own["kind"], own["model_version"], own["scale"]) == ("edges", "", 0.7)
    assert (version["kind"], version["model_version"]) == ("map", CONTROLNET)
    assert (version["digest"], version["dataset_version"]) == ("1" * 64, VERSION)
    assert version["image"] == image


async def test_a_controlnet_is_part_of_an_images_lineage(
    trained: Platform, painter: Painter
) -> None:
    image = trained.add_image(SKETCH)
    control = {"image": image, "kind": MAP, "model": CONTROLNET}
    generation = await draw(trained, {**control, "scale": 0.4}, {**control, "scale": 0.2})
    request = generate_pb2.GetImageLineageRequest(name=generation.images[0].name)
    (used,) = (await stub(trained).GetImageLineage(request)).adapters
    assert (used.model_version, used.weight) == (CONTROLNET, 0.4)
    assert used.dataset_version == VERSION
    assert [photograph.file_name for photograph in used.photographs] == ["1.jpg"]
    with trained.catalog.reading() as session:  # by this row the train service keeps the version
        assert session.get(GenerationAdapterRow, (generation.name, CONTROLNET)) is not None


class TestAllowed:
    @pytest.fixture
    def settings(self) -> dict[str, Any]:
        return {"restricted_content": "allow"}

    async def test_what_an_image_for_adults_holds_is_for_adults(
        self, held: Platform, painter: Painter
    ) -> None:
        image = held.add_image(SKETCH)
        with held.catalog.transaction() as session:
            session.get_one(ImageRow, image).content_rating = "RESTRICTED"
        generation = await draw(held, {"image": image})
        assert generation.images[0].content_rating == common_pb2.CONTENT_RATING_RESTRICTED
