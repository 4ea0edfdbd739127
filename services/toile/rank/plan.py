"""A request to rank, checked against the catalog before anything costs anything."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.bases import resolve_base
from toile.core.catalog.models import BaseRow, DatasetRow, DatasetVersionRow, ImageRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from toile.core.names import DatasetName, DatasetVersionName, ImageName, ProjectName
from toile.core.settings import Settings
from toile.scoring import Need, default_weights, get_scorer
from toile.v1 import rank_pb2

_NAMES_A_QUERY = 500  # SQLite limits the variables of one statement


@dataclass(frozen=True)
class RankPlan:
    """What to rank and how; all of it exists.

    prompt: judged against instead of each image's own when not empty.
    """

    project: str
    images: Sequence[ImageRow]
    weights: Mapping[str, float]
    prompt: str
    base: BaseRow
    version: DatasetVersionRow | None

    @property
    def needs(self) -> frozenset[Need]:
        """What the scorers must know about each image."""
        return frozenset().union(*(get_scorer(name).needs for name in self.weights))

    def prompt_of(self, image: ImageRow) -> str:
        """What the image should show; empty when nobody said."""
        return (self.prompt or image.prompt).strip()


def make_plan(
    session: Session, settings: Settings, request: rank_pb2.RankImagesRequest
) -> RankPlan:
    """Check a request.

    Raises:
        InvalidArgumentError: It cannot be right in any state of the catalog.
        NotFoundError: An image or the dataset does not exist.
        FailedPreconditionError: The dataset has no version yet (`DATASET_NOT_BUILT`).
    """
    project = ProjectName.parse(request.parent, "parent").project
    limit = settings.limits.prompt_characters
    if len(request.prompt) > limit:
        raise InvalidArgumentError(
            f"the prompt has {len(request.prompt)} characters, {limit} are allowed",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )
    names = _image_names(request.images, project, settings.limits.images_per_ranking)
    weights = _weights(request)
    return RankPlan(
        project=project,
        images=_find_images(session, names),
        weights=weights,
        prompt=request.prompt,
        base=resolve_base(session, settings.default_base),
        version=_find_version(session, request.dataset, project) if request.dataset else None,
    )


def _image_names(names: Sequence[str], project: str, limit: int) -> Sequence[str]:
    if not 1 <= len(names) <= limit:
        raise InvalidArgumentError(
            f"images must be 1 to {limit}, not {len(names)}", field="images", reason="IMAGE_COUNT"
        )
    seen: set[str] = set()
    for name in names:
        if ImageName.parse(name, "images").project != project:
            raise InvalidArgumentError(
                f"{name} is not an image of projects/{project}",
                field="images",
                reason="OTHER_PROJECT",
            )
        if name in seen:
            raise InvalidArgumentError(
                f"{name} is named twice", field="images", reason="DUPLICATE_IMAGE"
            )
        seen.add(name)
    return names


def _weights(request: rank_pb2.RankImagesRequest) -> dict[str, float]:
    if not request.scorers:
        return default_weights(with_dataset=bool(request.dataset))
    weights: dict[str, float] = {}
    for wanted in request.scorers:
        scorer = get_scorer(wanted.scorer)
        weight = wanted.weight if wanted.HasField("weight") else 1.0
        if scorer.name in weights:
            raise _bad_weights(f"scorer {scorer.name!r} is named twice")
        if not (math.isfinite(weight) and weight >= 0):
            raise _bad_weights(f"the weight of {scorer.name!r} must be 0 or more, not {weight}")
        if scorer.needs_dataset and not request.dataset:
            raise InvalidArgumentError(
                f"scorer {scorer.name!r} compares with a dataset: name one",
                field="dataset",
                reason="DATASET_NEEDED",
            )
        weights[scorer.name] = weight
    # Weights near the largest number would overflow when they are added.
    if not 0 < math.fsum(weights.values()) < math.inf or max(weights.values()) > _MAX_WEIGHT:
        raise _bad_weights(f"one weight at least must be above 0, and none above {_MAX_WEIGHT:g}")
    return weights


_MAX_WEIGHT = 1e6


def _bad_weights(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="scorers", reason="BAD_WEIGHT")


def _find_images(session: Session, names: Sequence[str]) -> list[ImageRow]:
    rows: dict[str, ImageRow] = {}
    for start in range(0, len(names), _NAMES_A_QUERY):
        some = names[start : start + _NAMES_A_QUERY]
        for row in session.scalars(select(ImageRow).where(ImageRow.name.in_(some))):
            rows[row.name] = row
    for name in names:
        if name not in rows:
            raise NotFoundError(f"there is no image {name}", metadata={"name": name})
    return [rows[name] for name in names]


def _find_version(session: Session, name: str, project: str) -> DatasetVersionRow:
    by_version = DatasetVersionName.matches(name)
    kind = DatasetVersionName if by_version else DatasetName
    if kind.parse(name, "dataset").project != project:
        raise InvalidArgumentError(
            f"{name} is not a dataset of projects/{project}",
            field="dataset",
            reason="OTHER_PROJECT",
        )
    if by_version:
        row = session.get(DatasetVersionRow, name)
    else:
        if session.get(DatasetRow, name) is None:
            raise NotFoundError(f"there is no dataset {name}", metadata={"name": name})
        row = session.scalars(
            select(DatasetVersionRow)
            .where(DatasetVersionRow.dataset == name)
            .order_by(DatasetVersionRow.number.desc())
            .limit(1)
        ).first()
        if row is None:
            raise FailedPreconditionError(
                f"{name} has no version yet: build it first",
                reason="DATASET_NOT_BUILT",
                metadata={"name": name},
            )
    if row is None:
        raise NotFoundError(f"there is no dataset version {name}", metadata={"name": name})
    return row
