"""A store or a catalog that is away, or full, for a while does not cost a training."""

import logging
from collections.abc import Callable
from typing import TypeVar

import tenacity

from toile.core.errors import DiskFullError, UnavailableError
from toile.core.jobs.failures import is_disk_full
from toile.core.jobs.progress import Figure
from toile.core.jobs.runtime import JobContext

PATIENCE_SECONDS = 90.0
PAUSE_SECONDS = 3.0
PASSING = (UnavailableError, DiskFullError)

_log = logging.getLogger(__name__)

R = TypeVar("R")


def patiently(job: JobContext, phase: str, work: Callable[[], R]) -> R:
    """Do work that needs the store or the catalog; again, as long as it may come back.

    Raises:
        CancelledError: The job should stop.
        UnavailableError: It stayed away for `PATIENCE_SECONDS`.
        DiskFullError: It stayed full for as long.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        job.check()
        error = state.outcome.exception() if state.outcome else None
        report(job, phase, 0, 1, message=f"{error}; trying again")

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_fixed(PAUSE_SECONDS),
        stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
        before_sleep=tell,
        reraise=True,
    )
    return retrying(work)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, PASSING) or is_disk_full(error)


def report(job: JobContext, phase: str, step: int, total_steps: int, **figures: Figure) -> None:
    """Report progress; where the catalog is away or full only the report is lost.

    Raises:
        CancelledError: The job should stop.
    """
    try:
        job.report(phase, step, total_steps, **figures)
    except PASSING as error:
        _log.warning("step %d of %s is not told: %s", step, phase, error.message)
