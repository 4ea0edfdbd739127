"""From what a client asked to what will be drawn: every default filled in, every mistake found."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore
from toile.core.bases import resolve_base
from toile.core.catalog.models import BaseRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.names import ProjectName
from toile.core.samplers import check_scheduler_name
from toile.core.settings import Limits, Settings
from toile.generate.adapters import (
    Adapter,
    adapter_to_proto,
    check_base,
    resolve_adapters,
)
from toile.generate.checks import known, share, within, within_floats
from toile.generate.controls import IMAGE_FIELD, Control, hold_edges, resolve_controls
from toile.generate.facts import BaseFacts
from toile.generate.prompts import check_prompts
from toile.generate.sizes import Sizes, resolve_size
from toile.generate.sources import (
    Source,
    SourcePixels,
    find_source,
    read_image,
    read_source,
    resolve_source,
)
from toile.imaging.palette import MOST_COLOURS, parse_colour
from toile.v1 import common_pb2, generate_pb2

DEFAULT_STEPS = 20
MAX_GUIDANCE_SCALE = 30.0
DEFAULT_REFINER_STRENGTH = 0.2
MAX_REFINER_STRENGTH = 0.5
DEFAULT_QUALITY = 90
MAX_SEED = 2**63 - 1
RANDOM_SEEDS = 2**32


@dataclass(frozen=True)
class Plan:
    """A request that can be drawn. `request` has every default filled in.

    Only its prompt may still be empty, when it starts from an image that has none: then somebody
    has to look at the image, and `with_caption` makes a whole plan.
    """

    project: str
    request: generate_pb2.GenerateRequest
    base: BaseRow
    adapters: Sequence[Adapter]
    controls: Sequence[Control]
    source: Source | None
    pixels: SourcePixels | None

    @property
    def restricted_field(self) -> str:
        """Field that names an image which is for adults; empty when there is none."""
        if self.source is not None and self.source.restricted:
            return f"{self.request.WhichOneof('source')}.{self.source.restricted}"
        return IMAGE_FIELD if any(one.is_restricted for one in self.controls) else ""


class Resolver:
    """Makes plans of requests."""

    def __init__(
        self, settings: Settings, store: ArtifactStore, facts: Callable[[str], BaseFacts]
    ) -> None:
        """Make it; `facts` gives what is known of a base's artifact."""
        self._settings = settings
        self._store = store
        self._facts = facts

    def resolve(self, session: Session, request: generate_pb2.GenerateRequest) -> Plan:
        """Check a request and fill in its defaults; nothing is drawn or recorded before.

        Raises:
            InvalidArgumentError: A field is wrong; metadata `field` names it.
            BadImageError: An image cannot be decoded; metadata `field` says which.
            NotFoundError: There is no such base, adapter, ControlNet or image.
            FailedPreconditionError: The base has no refiner (`NO_REFINER`) or none of its own
                ControlNets is of a kind (`NO_CONTROLNET`), or what is asked for is for adults and
                refused here (`RESTRICTED_CONTENT`).
        """
        settings, limits = self._settings, self._settings.limits
        project = ProjectName.parse(request.parent, "parent").project
        resolved = generate_pb2.GenerateRequest()
        resolved.CopyFrom(request)
        _resolve_numbers(resolved, limits)
        _resolve_output(resolved)
        adapters = resolve_adapters(session, settings, project, request.adapters)
        base = resolve_base(session, request.base or settings.default_base)
        check_base(adapters, base)
        del resolved.adapters[:]
        resolved.adapters.extend(adapter_to_proto(adapter) for adapter in adapters)
        resolved.base = base.name
        facts = self._facts(base.artifact)
        _resolve_for_base(resolved, facts)
        source = find_source(session, project, resolved)
        controls = resolve_controls(session, project, base, facts, resolved)
        if source is not None and not resolved.prompt.strip():
            resolved.prompt = source.image.prompt.strip()
        plan = Plan(project, resolved, base, adapters, controls, source, None)
        if source is None or resolved.prompt:
            self._check_prompts(plan, facts)
        pixels = None if source is None else read_source(self._store, limits, resolved, source)
        for control in controls:
            if source is None or control.image.name != source.image.name:
                read_image(self._store, limits, control.image, IMAGE_FIELD)
        _resolve_sizes(resolved, pixels, base.native_size, limits)
        return replace(plan, pixels=pixels)

    def holding_edges(
        self, session: Session, request: generate_pb2.GenerateRequest
    ) -> generate_pb2.GenerateRequest:
        """Return a redesign whose source's edges hold, where the base can; see `hold_edges`.

        Raises:
            InvalidArgumentError: The base's name is none.
            NotFoundError: There is no such base.
        """
        base = resolve_base(session, request.base or self._settings.default_base)
        held = generate_pb2.GenerateRequest()
        held.CopyFrom(request)
        hold_edges(held, self._facts(base.artifact))
        return held

    def with_caption(self, plan: Plan, caption: str) -> Plan:
        """Return a plan whose prompt is a caption of its source.

        Raises:
            InvalidArgumentError: There is nothing in it (`EMPTY_PROMPT`).
            FailedPreconditionError: The source is for adults, which is refused here.
        """
        request = generate_pb2.GenerateRequest()
        request.CopyFrom(plan.request)
        request.prompt = caption
        captioned = replace(plan, request=request)
        self._check_prompts(captioned, self._facts(plan.base.artifact))
        return captioned

    def _check_prompts(self, plan: Plan, facts: BaseFacts) -> None:
        check_prompts(plan.request, self._settings, facts, restricted_field=plan.restricted_field)


def _resolve_numbers(request: generate_pb2.GenerateRequest, limits: Limits) -> None:
    _resolve_seeds(request, limits.images_per_generation)
    request.steps = within("steps", request.steps or DEFAULT_STEPS, 1, limits.steps)
    if request.HasField("guidance_scale"):
        within_floats("guidance_scale", request.guidance_scale, 1.0, MAX_GUIDANCE_SCALE)
    within_floats("guidance_rescale", request.guidance_rescale, 0.0, 1.0)
    within("preview_interval", request.preview_interval, 0, limits.steps)
    known("repeat", request.repeat, common_pb2.Repeat)
    known("priority", request.priority, common_pb2.Priority)
    if request.priority == common_pb2.PRIORITY_UNSPECIFIED:
        request.priority = common_pb2.PRIORITY_INTERACTIVE


def _resolve_seeds(request: generate_pb2.GenerateRequest, most: int) -> None:
    if not request.seeds:
        request.count = within("count", request.count if request.HasField("count") else 1, 1, most)
        if not request.HasField("seed"):
            request.seed = secrets.randbelow(RANDOM_SEEDS)
        within("seed", request.seed, 0, MAX_SEED - request.count)
        return
    if request.HasField("seed"):
        raise InvalidArgumentError("seeds are instead of seed", field="seeds")
    if request.HasField("count") and request.count != len(request.seeds):
        raise InvalidArgumentError(
            f"count is {request.count}, but there are {len(request.seeds)} seeds", field="seeds"
        )
    request.count = within("seeds", len(request.seeds), 1, most)
    for seed in request.seeds:
        within("seeds", seed, 0, MAX_SEED)


def _resolve_output(request: generate_pb2.GenerateRequest) -> None:
    output = request.output
    known("output.format", output.format, generate_pb2.ImageFormat)
    output.format = output.format or generate_pb2.IMAGE_FORMAT_PNG
    if output.format != generate_pb2.IMAGE_FORMAT_PNG:
        output.quality = within("output.quality", output.quality or DEFAULT_QUALITY, 1, 100)
    elif output.quality:
        raise InvalidArgumentError("PNG has no quality", field="output.quality")
    if request.HasField("palette"):
        _resolve_palette(request.palette)


def _resolve_palette(palette: generate_pb2.Palette) -> None:
    within("palette.colours", len(palette.colours), 1, MOST_COLOURS)
    for text in palette.colours:
        if parse_colour(text) is None:
            raise InvalidArgumentError(
                f"a colour is #rrggbb or a name such as dark red, not {text[:40]!r}",
                field="palette.colours",
                reason="UNKNOWN_COLOUR",
            )
    if not palette.HasField("strength"):
        palette.strength = 1.0
    share("palette.strength", palette.strength)


def _resolve_sizes(
    request: generate_pb2.GenerateRequest, pixels: SourcePixels | None, native: int, limits: Limits
) -> None:
    sizes = Sizes.of(native, limits.image_side_pixels, request.repeat)
    if pixels is None:
        resolve_size(request, sizes, None)
        return
    shape = resolve_source(request, pixels, sizes, limits)
    if not request.HasField("upscale"):
        resolve_size(request, sizes, shape)
        return
    for field, side in zip(("width", "height"), shape, strict=True):
        if getattr(request, field) not in (0, side) or request.aspect_ratio:
            raise InvalidArgumentError(
                f"an upscaled image is as large as its factor says: {shape[0]} x {shape[1]}",
                field="aspect_ratio" if request.aspect_ratio else field,
            )
    request.width, request.height = shape


def _resolve_for_base(request: generate_pb2.GenerateRequest, facts: BaseFacts) -> None:
    request.scheduler = check_scheduler_name(request.scheduler) or facts.scheduler
    if not request.HasField("guidance_scale"):
        request.guidance_scale = facts.guidance_scale
    if request.HasField("refiner"):
        _resolve_refiner(request, facts)


def _resolve_refiner(request: generate_pb2.GenerateRequest, facts: BaseFacts) -> None:
    if not facts.has_refiner:
        raise FailedPreconditionError(f"{request.base} has no refiner", reason="NO_REFINER")
    refiner = request.refiner
    known("refiner.mode", refiner.mode, common_pb2.RefinerMode)
    refiner.mode = refiner.mode or common_pb2.REFINER_MODE_SPLIT
    if request.WhichOneof("source") is not None:
        raise InvalidArgumentError(
            "the refiner stage is for drawings from noise, not for those that start from an image",
            field="refiner",
            reason="REFINER_WITH_SOURCE",
        )
    if not refiner.HasField("strength"):
        refiner.strength = DEFAULT_REFINER_STRENGTH
    share("refiner.strength", refiner.strength, MAX_REFINER_STRENGTH)
    if refiner.strength * request.steps < 1:
        raise InvalidArgumentError(
            f"{request.steps} steps leave none for a refiner of strength {refiner.strength:g}",
            field="refiner.strength",
        )
