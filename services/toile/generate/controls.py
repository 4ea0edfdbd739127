"""The ControlNets that a generation draws with, and the images whose structure they hold."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.orm import Session

from toile.core.adapter_types import AdapterType
from toile.core.catalog.models import BaseRow, ImageRow, ModelVersionRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.generate.adapters import resolve_version
from toile.generate.checks import known, within_floats
from toile.generate.facts import BaseFacts
from toile.generate.sources import find_image
from toile.imaging.control_maps import ControlKind
from toile.v1 import generate_pb2

MAX_CONTROLS = 4
MAX_SCALE = 2.0
KEPT_SCALE = 0.7
"""How far `RedesignWithPrompt` holds a drawing to its source's edges."""
MAP = "map"
"""Of an image that is a map already, where a kind is named."""
IMAGE_FIELD = "controls.image"

_KINDS = {
    generate_pb2.CONTROL_KIND_EDGES: ControlKind.EDGES,
    generate_pb2.CONTROL_KIND_PARTS: ControlKind.PARTS,
    generate_pb2.CONTROL_KIND_EDGES_PARTS: ControlKind.EDGES_PARTS,
}


@dataclass(frozen=True)
class Control:
    """A ControlNet that a generation draws with."""

    wanted: generate_pb2.Control
    """As a resolved request has it."""
    image: ImageRow
    version: ModelVersionRow | None
    """None for one that comes with the base."""
    digest: str
    """Of the version, or of the base's folder with the network."""

    @property
    def kind(self) -> str:
        """What is shown of the image: a `ControlKind`, or `MAP`."""
        return _KINDS.get(self.wanted.kind, MAP)

    @property
    def is_restricted(self) -> bool:
        """Whether its image is for adults."""
        return self.image.content_rating == "RESTRICTED"


def control_images(request: generate_pb2.GenerateRequest) -> Iterator[tuple[str, str]]:
    """Yield field and name of the image of each control of a resolved request."""
    for control in request.controls:
        yield IMAGE_FIELD, control.image


def hold_edges(request: generate_pb2.GenerateRequest, facts: BaseFacts) -> None:
    """Have the edges of what is redesigned hold, unless the request says what does.

    Nothing is added where the base has no ControlNet for edges, nor to a tile that repeats.
    """
    if not request.controls and not request.repeat and ControlKind.EDGES in facts.controlnets:
        request.controls.add(kind=generate_pb2.CONTROL_KIND_EDGES, scale=KEPT_SCALE)


def resolve_controls(
    session: Session,
    project: str,
    base: BaseRow,
    facts: BaseFacts,
    request: generate_pb2.GenerateRequest,
) -> list[Control]:
    """Return the ControlNets that a request names, and fill in what it leaves open.

    Those of scale 0 are left out. A resolved request gives the same again.

    Raises:
        InvalidArgumentError: There are too many (`TOO_MANY_CONTROLS`), a number is wrong, one has
            no image (`NO_CONTROL_IMAGE`) or is a map without a model (`MAP_NEEDS_MODEL`), a model
            is none (`NOT_A_CONTROLNET`) or of another base (`CONTROL_MISMATCH`), or the drawing
            is not one of those that can be held (`CONTROLS_REFUSED`).
        NotFoundError: There is no such image or model in the project.
        FailedPreconditionError: The base has none of a kind (`NO_CONTROLNET`).
    """
    if len(request.controls) > MAX_CONTROLS:
        raise InvalidArgumentError(
            f"{len(request.controls)} controls; {MAX_CONTROLS} are the most",
            field="controls",
            reason="TOO_MANY_CONTROLS",
        )
    for one in request.controls:
        _resolve_numbers(one)
    holding = [one for one in request.controls if one.scale]
    if holding:
        _check_drawing(request)
    controls = [
        _resolve(session, project, base, facts, one, request.redesign.image) for one in holding
    ]
    del request.controls[:]
    request.controls.extend(control.wanted for control in controls)
    return controls


def _resolve_numbers(control: generate_pb2.Control) -> None:
    known("controls.kind", control.kind, generate_pb2.ControlKind)
    control.kind = control.kind or generate_pb2.CONTROL_KIND_EDGES
    if not control.HasField("scale"):
        control.scale = 1.0
    within_floats("controls.scale", control.scale, 0.0, MAX_SCALE)
    if not control.HasField("start"):
        control.start = 0.0
    within_floats("controls.start", control.start, 0.0, 1.0)
    if not control.HasField("end"):
        control.end = 1.0
    within_floats("controls.end", control.end, 0.0, 1.0)
    if control.start >= control.end:
        raise InvalidArgumentError(
            f"a control must start before it ends, not at {control.start:g} of {control.end:g}",
            field="controls.start",
        )


def _check_drawing(request: generate_pb2.GenerateRequest) -> None:
    kind = request.WhichOneof("source")
    if kind in ("inpaint", "upscale") or request.repeat:
        raise InvalidArgumentError(
            "controls hold drawings from noise and from a whole image, not "
            f"{'a tile that repeats' if request.repeat else f'those of {kind}'}",
            field="controls",
            reason="CONTROLS_REFUSED",
        )


def _resolve(
    session: Session,
    project: str,
    base: BaseRow,
    facts: BaseFacts,
    wanted: generate_pb2.Control,
    source: str,
) -> Control:
    resolved = generate_pb2.Control()
    resolved.CopyFrom(wanted)
    resolved.image = wanted.image or source
    if not resolved.image:
        raise InvalidArgumentError(
            "a control needs an image where none is redesigned",
            field=IMAGE_FIELD,
            reason="NO_CONTROL_IMAGE",
        )
    image = find_image(session, project, IMAGE_FIELD, resolved.image)
    if not wanted.model:
        return Control(resolved, image, None, _own(base, facts, wanted.kind))
    version = resolve_version(session, project, wanted.model, AdapterType.CONTROLNET)
    if version.base != base.name:
        raise InvalidArgumentError(
            f"{version.name} works with {version.base}, not {base.name}",
            field="controls.model",
            reason="CONTROL_MISMATCH",
        )
    resolved.model = version.name
    return Control(resolved, image, version, version.digest)


def _own(base: BaseRow, facts: BaseFacts, kind: generate_pb2.ControlKind.ValueType) -> str:
    """Return the digest of a base's own ControlNet."""
    if kind not in _KINDS:
        raise InvalidArgumentError(
            "a map is for the ControlNet that `model` names",
            field="controls.model",
            reason="MAP_NEEDS_MODEL",
        )
    if (digest := facts.controlnets.get(_KINDS[kind])) is None:
        kinds = ", ".join(sorted(facts.controlnets))
        raise FailedPreconditionError(
            f"{base.name} has no ControlNet for {_KINDS[kind]}; it has {kinds or 'none'}",
            reason="NO_CONTROLNET",
            metadata={"field": "controls.kind", "kinds": kinds},
        )
    return digest
