"""What a training would take, by what an earlier one took."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.catalog.models import JobRow
from toile.core.jobs import JobKind, JobState
from toile.core.jobs.costs import Usage, usage_of
from toile.training.config import RECIPES, RecipeConfig

LOOKED_AT = 200
"""Newest trainings among which one of the same kind is looked for."""


@dataclass(frozen=True)
class Estimate:
    """What a training is likely to take.

    Attributes:
        usage: Compute.
        seconds: From start to end.
        job: Name of the job that it follows from.
    """

    usage: Usage
    seconds: float
    job: str


def estimate(session: Session, project: str, base: str, config: RecipeConfig) -> Estimate | None:
    """Scale what the project's newest training of this recipe and base took by the images to see.

    What does not grow with them, such as starting workers and drawing samples or class images, is
    scaled with the rest: a much longer training takes less than this, a much shorter one more.
    Those that were paused or lost say nothing of the time, and one that ended early saw fewer
    images than it says.
    """
    rows = session.scalars(
        select(JobRow)
        .where(
            JobRow.project == project,
            JobRow.kind == JobKind.TRAINING.value,
            JobRow.state == JobState.SUCCEEDED.value,
            JobRow.attempt == 1,
        )
        .order_by(JobRow.end_time.desc())
        .limit(LOOKED_AT)
    )
    for row in rows:
        if (row.spec["base"], row.spec["recipe"]) != (base, config.RECIPE):
            continue
        if row.start_time is None or row.end_time is None:
            continue
        earlier = RECIPES[config.RECIPE].checked(row.spec["config"])
        factor = config.steps * config.images_per_step / (earlier.steps * earlier.images_per_step)
        seconds = (row.end_time - row.start_time).total_seconds()
        return Estimate(usage_of(row).scaled(factor), seconds * factor, row.name)
    return None
