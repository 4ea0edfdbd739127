"""What jobs are and may be, in words that whoever reads their rows shares."""

from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from toile.core.catalog.models import JobRow
from toile.core.clock import now
from toile.core.errors import CancelledError

CHECKPOINTS_FOLDER = "checkpoints"
"""Of a training, under its job's name in the artifact store."""


class JobKind(StrEnum):
    """What a job does."""

    DATASET_BUILD = "DATASET_BUILD"
    TRAINING = "TRAINING"


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class SupersededError(CancelledError):
    """A process that may no longer write: the job ended, or a later attempt has started."""

    default_reason = "SUPERSEDED"


class Asked(NamedTuple):
    """What a running job is asked for: to stop for now, or to draw samples."""

    to_stop: bool
    for_samples: bool


def heartbeat_age_seconds(row: JobRow, at: datetime | None = None) -> float:
    """Seconds since the job's process last showed that it lives; infinite if it never did."""
    if row.heartbeat_time is None:
        return float("inf")
    return ((at or now()) - row.heartbeat_time).total_seconds()
