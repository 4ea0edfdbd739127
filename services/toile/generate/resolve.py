"""From what a client asked to what will be drawn: every default filled in, every mistake found."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.bases import resolve_base
from toile.core.catalog.models import BaseRow, ModelVersionRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from toile.core.names import ModelName, ModelVersionName, ProjectName
from toile.core.samplers import check_scheduler_name
from toile.core.settings import Settings
from toile.generate.facts import BaseFacts
from toile.v1 import common_pb2, generate_pb2

DEFAULT_STEPS = 20
MAX_GUIDANCE_SCALE = 30.0
DEFAULT_REFINER_STRENGTH = 0.2
MAX_REFINER_STRENGTH = 0.5
MAX_ADAPTER_WEIGHT = 10.0
MAX_SEED = 2**63 - 1
RANDOM_SEEDS = 2**32
SIZE_FACTOR = 2
"""Sides may be down to a half of the base's native size and up to twice it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that a generation draws with."""

    version: ModelVersionRow
    weight: float


@dataclass(frozen=True)
class Plan:
    """A request that can be drawn. `request` has every default filled in."""

    project: str
    request: generate_pb2.GenerateRequest
    base: BaseRow
    adapters: Sequence[Adapter]


def resolve(
    session: Session,
    settings: Settings,
    facts: Callable[[str], BaseFacts],
    request: generate_pb2.GenerateRequest,
) -> Plan:
    """Check a request and fill in its defaults; nothing is drawn or recorded before.

    Args:
        session: The catalog.
        settings: Limits and defaults.
        facts: Gives what is known of a base's artifact.
        request: As the client sent it.

    Raises:
        InvalidArgumentError: A field is wrong; metadata `field` names it.
        NotFoundError: There is no such base or adapter.
        FailedPreconditionError: The base has no refiner (`NO_REFINER`).
    """
    project = ProjectName.parse(request.parent, "parent").project
    resolved = generate_pb2.GenerateRequest()
    resolved.CopyFrom(request)
    _resolve_numbers(resolved, settings)
    _check_texts(resolved, settings)
    adapters = _resolve_adapters(session, settings, project, request.adapters)
    base = resolve_base(session, request.base or settings.default_base)
    for adapter in adapters:
        if adapter.version.base != base.name:
            raise InvalidArgumentError(
                f"{adapter.version.name} works with {adapter.version.base}, not {base.name}",
                field="adapters",
                reason="ADAPTER_MISMATCH",
            )
    del resolved.adapters[:]
    resolved.adapters.extend(
        common_pb2.AdapterWeight(model=a.version.name, weight=a.weight) for a in adapters
    )
    resolved.base = base.name
    _resolve_size(resolved, base.native_size, settings.limits.image_side_pixels)
    _resolve_for_base(resolved, facts(base.artifact))
    return Plan(project, resolved, base, adapters)


def _resolve_numbers(request: generate_pb2.GenerateRequest, settings: Settings) -> None:
    limits = settings.limits
    request.count = _within("count", request.count or 1, 1, limits.images_per_generation)
    request.steps = _within("steps", request.steps or DEFAULT_STEPS, 1, limits.steps)
    if not request.HasField("seed"):
        request.seed = secrets.randbelow(RANDOM_SEEDS)
    _within("seed", request.seed, 0, MAX_SEED - request.count)
    if request.HasField("guidance_scale"):
        _within_floats("guidance_scale", request.guidance_scale, 1.0, MAX_GUIDANCE_SCALE)


def _check_texts(request: generate_pb2.GenerateRequest, settings: Settings) -> None:
    limit = settings.limits.prompt_characters
    if not request.prompt.strip():
        raise InvalidArgumentError("prompt is empty", field="prompt", reason="EMPTY_PROMPT")
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field))
        if length > limit:
            raise InvalidArgumentError(
                f"{field} has {length} characters; {limit} are the most",
                field=field,
                reason="PROMPT_TOO_LONG",
                metadata={"characters": str(length), "limit": str(limit)},
            )


def _resolve_size(request: generate_pb2.GenerateRequest, native: int, longest: int) -> None:
    low, high = native // SIZE_FACTOR, min(native * SIZE_FACTOR, longest)
    for field in ("width", "height"):
        side = getattr(request, field) or native
        if side % 8 or not low <= side <= high:
            raise InvalidArgumentError(
                f"{field} must be a multiple of 8 from {low} to {high} pixels, not {side}",
                field=field,
                reason="BAD_SIZE",
            )
        setattr(request, field, side)


def _resolve_for_base(request: generate_pb2.GenerateRequest, facts: BaseFacts) -> None:
    request.scheduler = check_scheduler_name(request.scheduler) or facts.scheduler
    if not request.HasField("guidance_scale"):
        request.guidance_scale = facts.guidance_scale
    facts.check_prompt(request.prompt, "prompt")
    facts.check_prompt(request.negative_prompt, "negative_prompt")
    if not request.HasField("refiner"):
        return
    if not facts.has_refiner:
        raise FailedPreconditionError(f"{request.base} has no refiner", reason="NO_REFINER")
    if not request.refiner.HasField("strength"):
        request.refiner.strength = DEFAULT_REFINER_STRENGTH
    strength = _within_floats(
        "refiner.strength", request.refiner.strength, 0.0, MAX_REFINER_STRENGTH
    )
    if strength * request.steps < 1:
        raise InvalidArgumentError(
            f"{request.steps} steps leave none for a refiner of strength {strength:g}",
            field="refiner.strength",
        )


def _resolve_adapters(
    session: Session,
    settings: Settings,
    project: str,
    wanted: Sequence[common_pb2.AdapterWeight],
) -> list[Adapter]:
    if len(wanted) > settings.limits.adapters:
        raise InvalidArgumentError(
            f"{len(wanted)} adapters; {settings.limits.adapters} are the most",
            field="adapters",
            reason="TOO_MANY_ADAPTERS",
        )
    adapters = [
        Adapter(
            resolve_version(session, project, one.model),
            _within_floats(
                "adapters.weight",
                one.weight if one.HasField("weight") else 1.0,
                -MAX_ADAPTER_WEIGHT,
                MAX_ADAPTER_WEIGHT,
            ),
        )
        for one in wanted
    ]
    if len({adapter.version.name for adapter in adapters}) < len(adapters):
        raise InvalidArgumentError(
            "an adapter is named twice", field="adapters", reason="DUPLICATE_ADAPTER"
        )
    return adapters


def resolve_version(session: Session, project: str, name: str) -> ModelVersionRow:
    """Return a model version by its name, or a model's newest.

    Raises:
        InvalidArgumentError: It is neither name.
        NotFoundError: There is none in the project.
    """
    if ModelName.matches(name):
        model = ModelName.parse(name)
        newest = select(ModelVersionRow).where(ModelVersionRow.model == name)
        row = session.scalars(newest.order_by(ModelVersionRow.number.desc()).limit(1)).first()
        owner = model.project
    else:
        owner = ModelVersionName.parse(name, "adapters.model").project
        row = session.get(ModelVersionRow, name)
    if row is None or owner != project:
        raise NotFoundError(
            f"there is no adapter {name} in projects/{project}",
            reason="ADAPTER_NOT_FOUND",
            metadata={"name": name, "field": "adapters"},
        )
    return row


def _within(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidArgumentError(f"{field} must be {low} to {high}, not {value}", field=field)
    return value


def _within_floats(field: str, value: float, low: float, high: float) -> float:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidArgumentError(
            f"{field} must be {low:g} to {high:g}, not {value:g}", field=field
        )
    return value
