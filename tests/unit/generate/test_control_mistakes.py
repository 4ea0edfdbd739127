"""Controls that cannot be drawn with: told before anything is recorded or drawn."""

from typing import Any

import pytest

from servers.controlled import (
    CONTROLNET,
    HELD_BASE,
    OTHERS_CONTROLNET,
    add_controlnets,
    add_held_base,
)
from servers.generating import Painter, add_adapter, count, refused
from servers.platform import MODEL_VERSION, PARENT, Platform, garment
from toile.core.catalog.models import GenerationRow, ImageRow
from toile.core.errors import (
    BadImageError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ToileError,
)
from toile.v1 import common_pb2, generate_pb2

NAN, INF = float("nan"), float("inf")
EDGES, PARTS, MAP = (
    generate_pb2.CONTROL_KIND_EDGES,
    generate_pb2.CONTROL_KIND_PARTS,
    generate_pb2.CONTROL_KIND_MAP,
)
OWN = {"image": "{image}"}


@pytest.fixture
def images(platform: Platform, painter: Painter) -> dict[str, str]:
    """Names of images, on a platform whose base `held` has a ControlNet for edges."""
    add_held_base(platform)
    add_adapter(platform)
    add_controlnets(platform)
    pixels = garment((206, 32, 40), size=(128, 128))
    made = {
        "{image}": platform.add_image(pixels),
        "{rivals}": platform.add_image(pixels, project="rival"),
        "{restricted}": platform.add_image(pixels),
        "{damaged}": platform.add_image(pixels),
    }
    with platform.catalog.transaction() as session:
        session.get_one(ImageRow, made["{restricted}"]).content_rating = "RESTRICTED"
        damaged = session.get_one(ImageRow, made["{damaged}"]).artifact
    platform.store.put(damaged, b"no image")
    return made


def controls(*wanted: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"controls": list(wanted), **fields}


INVALID, MISSING, REFUSED = InvalidArgumentError, NotFoundError, FailedPreconditionError
CASES: list[tuple[dict[str, Any], type[ToileError], str, str]] = [
    (controls(*[OWN] * 5), INVALID, "TOO_MANY_CONTROLS", "controls"),
    (controls({**OWN, "kind": 9}), INVALID, "INVALID_ARGUMENT", "controls.kind"),
    (controls({**OWN, "scale": NAN}), INVALID, "INVALID_ARGUMENT", "controls.scale"),
    (controls({**OWN, "scale": 2.1}), INVALID, "INVALID_ARGUMENT", "controls.scale"),
    (controls({**OWN, "scale": -0.1}), INVALID, "INVALID_ARGUMENT", "controls.scale"),
    (controls({**OWN, "start": NAN}), INVALID, "INVALID_ARGUMENT", "controls.start"),
    (controls({**OWN, "end": INF}), INVALID, "INVALID_ARGUMENT", "controls.end"),
    (controls({**OWN, "end": 1.1}), INVALID, "INVALID_ARGUMENT", "controls.end"),
    (controls({**OWN, "end": 0.0}), INVALID, "INVALID_ARGUMENT", "controls.start"),
    (
        controls({**OWN, "start": 0.5, "end": 0.5}),
        INVALID,
        "INVALID_ARGUMENT",
        "controls.start",
    ),
    (controls({"scale": 0.0, "end": NAN}), INVALID, "INVALID_ARGUMENT", "controls.end"),
    (controls({}), INVALID, "NO_CONTROL_IMAGE", "controls.image"),
    (controls({"image": "x"}), INVALID, "BAD_RESOURCE_NAME", "controls.image"),
    (
        controls({"image": f"{PARENT}/images/none"}),
        MISSING,
        "IMAGE_NOT_FOUND",
        "controls.image",
    ),
    (controls({"image": "{rivals}"}), MISSING, "IMAGE_NOT_FOUND", "controls.image"),
    (controls({"image": "{restricted}"}), REFUSED, "RESTRICTED_CONTENT", "controls.image"),
    (controls({"image": "{damaged}"}), BadImageError, "NOT_AN_IMAGE", "controls.image"),
    (controls({**OWN, "model": "x"}), INVALID, "BAD_RESOURCE_NAME", "controls.model"),
    (
        controls({**OWN, "model": f"{PARENT}/models/none"}),
        MISSING,
        "CONTROLNET_NOT_FOUND",
        "controls",
    ),
    (controls({**OWN, "model": MODEL_VERSION}), INVALID, "NOT_A_CONTROLNET", "controls.model"),
    (controls({**OWN, "model": OTHERS_CONTROLNET}), INVALID, "CONTROL_MISMATCH", "controls.model"),
    (controls({**OWN, "kind": MAP}), INVALID, "MAP_NEEDS_MODEL", "controls.model"),
    (controls({**OWN, "kind": PARTS}), REFUSED, "NO_CONTROLNET", "controls.kind"),
    (controls(OWN, base="bases/tiny"), REFUSED, "NO_CONTROLNET", "controls.kind"),
    (controls(OWN, repeat=common_pb2.REPEAT_BRICK), INVALID, "CONTROLS_REFUSED", "controls"),
    (
        controls(OWN, inpaint={"image": "{image}", "expansion": {"left": 8}}),
        INVALID,
        "CONTROLS_REFUSED",
        "controls",
    ),
    (controls(OWN, upscale={"image": "{image}"}), INVALID, "CONTROLS_REFUSED", "controls"),
    ({"adapters": [{"model": CONTROLNET}]}, INVALID, "NOT_A_LORA", "adapters.model"),
]


@pytest.mark.parametrize(("fields", "kind", "reason", "field"), CASES)
async def test_mistakes_about_controls(
    platform: Platform,
    painter: Painter,
    images: dict[str, str],
    fields: dict[str, Any],
    kind: type[ToileError],
    reason: str,
    field: str,
) -> None:
    error = await refused(platform, **{"base": HELD_BASE, **named(fields, images)})
    assert isinstance(error, kind)
    assert (error.reason, error.metadata.get("field")) == (reason, field)
    assert count(platform, GenerationRow) == 1, "the one that made the adapter"
    assert not painter.requests


async def test_what_a_base_has_is_told(platform: Platform, images: dict[str, str]) -> None:
    control = {"image": images["{image}"], "kind": PARTS}
    error = await refused(platform, base=HELD_BASE, controls=[control])
    assert error.metadata["kinds"] == "edges"
    assert "it has edges" in error.message


def named(value: Any, images: dict[str, str]) -> Any:
    """The value, with images by their names."""
    if isinstance(value, dict):
        return {key: named(inner, images) for key, inner in value.items()}
    if isinstance(value, list):
        return [named(inner, images) for inner in value]
    return images.get(value, value) if isinstance(value, str) else value
