"""The adapters that a generation draws with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sqlalchemy.orm import Session

from toile.core.adapter_types import AdapterType
from toile.core.catalog.models import BaseRow, ModelVersionRow
from toile.core.catalog.versions import find_version, project_of
from toile.core.errors import InvalidArgumentError, NotFoundError
from toile.core.settings import Settings
from toile.generate.checks import within, within_floats
from toile.v1 import common_pb2

MAX_ADAPTER_WEIGHT = 10.0
MAX_SCHEDULE_POINTS = 16

_WANTED_AS = {
    AdapterType.LORA: ("adapters", "adapter"),
    AdapterType.CONTROLNET: ("controls", "ControlNet"),
}
"""Field that names versions of a type, and what they are called there."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that a generation draws with."""

    version: ModelVersionRow
    weight: float
    schedule: Sequence[common_pb2.WeightPoint] = ()
    """Strength over the noise schedule, in place of the weight."""


def adapter_to_proto(adapter: Adapter) -> common_pb2.AdapterWeight:
    """Return an adapter as a resolved request names it."""
    if adapter.schedule:
        return common_pb2.AdapterWeight(model=adapter.version.name, schedule=adapter.schedule)
    return common_pb2.AdapterWeight(model=adapter.version.name, weight=adapter.weight)


def resolve_adapters(
    session: Session,
    settings: Settings,
    project: str,
    wanted: Sequence[common_pb2.AdapterWeight],
) -> list[Adapter]:
    """Return the adapters that a request names, by version.

    Raises:
        InvalidArgumentError: There are too many, one is named twice or is no LoRA, a weight or a
            schedule is wrong, or their ranks add up to more than engines take (`RANK_TOO_HIGH`).
        NotFoundError: There is no such adapter in the project.
    """
    most = settings.limits.adapters
    if len(wanted) > most:
        raise InvalidArgumentError(
            f"{len(wanted)} adapters; {most} are the most",
            field="adapters",
            reason="TOO_MANY_ADAPTERS",
        )
    adapters = [
        Adapter(
            resolve_version(session, project, one.model, AdapterType.LORA),
            _weight(one),
            _schedule(one),
        )
        for one in wanted
    ]
    if len({adapter.version.name for adapter in adapters}) < len(adapters):
        raise InvalidArgumentError(
            "an adapter is named twice", field="adapters", reason="DUPLICATE_ADAPTER"
        )
    _check_ranks(adapters, settings.engine.max_rank)
    return adapters


def _check_ranks(adapters: Sequence[Adapter], most: int) -> None:
    """Refuse ranks over an engine's, also where none draws: the same request works everywhere."""
    ranks = sum(int(adapter.version.config.get("rank", 0)) for adapter in adapters)
    if ranks > most:
        raise InvalidArgumentError(
            f"the adapters' ranks add up to {ranks}; {most} are the most",
            field="adapters",
            reason="RANK_TOO_HIGH",
            metadata={"ranks": str(ranks), "limit": str(most)},
        )


def _weight(wanted: common_pb2.AdapterWeight) -> float:
    weight = wanted.weight if wanted.HasField("weight") else 1.0
    return within_floats("adapters.weight", weight, -MAX_ADAPTER_WEIGHT, MAX_ADAPTER_WEIGHT)


def _schedule(wanted: common_pb2.AdapterWeight) -> Sequence[common_pb2.WeightPoint]:
    points, field = wanted.schedule, "adapters.schedule"
    if points and wanted.HasField("weight"):
        raise InvalidArgumentError("an adapter has a weight or a schedule, not both", field=field)
    within(field, len(points), 0, MAX_SCHEDULE_POINTS)
    for point in points:
        within_floats(f"{field}.share", point.share, 0.0, 1.0)
        within_floats(f"{field}.weight", point.weight, -MAX_ADAPTER_WEIGHT, MAX_ADAPTER_WEIGHT)
    if any(one.share >= other.share for one, other in pairwise(points)):
        raise InvalidArgumentError("the shares of a schedule must ascend", field=field)
    return points


def check_base(adapters: Sequence[Adapter], base: BaseRow) -> None:
    """Refuse adapters of another base.

    Raises:
        InvalidArgumentError: One is (`ADAPTER_MISMATCH`).
    """
    for adapter in adapters:
        if adapter.version.base != base.name:
            raise InvalidArgumentError(
                f"{adapter.version.name} works with {adapter.version.base}, not {base.name}",
                field="adapters",
                reason="ADAPTER_MISMATCH",
            )


def resolve_version(
    session: Session, project: str, name: str, wanted: AdapterType
) -> ModelVersionRow:
    """Return a model version by its name or an alias, or a model's newest.

    Raises:
        InvalidArgumentError: It is none of these names, or the version is of another type
            (`NOT_A_LORA`, `NOT_A_CONTROLNET`).
        NotFoundError: There is none in the project (`ADAPTER_NOT_FOUND`, `CONTROLNET_NOT_FOUND`).
    """
    field, noun = _WANTED_AS[wanted]
    owner = project_of(name, f"{field}.model")
    row = find_version(session, name) if owner == project else None
    if row is None:
        raise NotFoundError(
            f"there is no {noun} {name} in projects/{project}",
            reason=f"{noun.upper()}_NOT_FOUND",
            metadata={"name": name, "field": field},
        )
    if row.adapter_type != wanted:
        raise InvalidArgumentError(
            f"{row.name} is a {row.adapter_type}; `{field}` takes a {wanted}",
            field=f"{field}.model",
            reason=f"NOT_A_{wanted.upper()}",
        )
    return row
