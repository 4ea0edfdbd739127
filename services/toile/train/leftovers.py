"""Checkpoints of trainings that ended without a version: no attempt can go on from them.

Those of a full-size ControlNet are tens of gigabytes. Samples are kept, for they tell why a
training was cancelled, or how far one came that failed.
"""

import asyncio
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select

from toile.core.artifacts import ArtifactStore, delete_folder
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.clock import now
from toile.core.errors import ToileError
from toile.core.jobs import JobKind, JobState
from toile.core.jobs.states import CHECKPOINTS_FOLDER

INTERVAL_SECONDS = 30.0
_AGAIN = timedelta(minutes=5)
"""Who ended so long before the last sweep is looked at again: clocks differ, and a process that was
cancelled and did not notice may have kept one more."""

_log = structlog.stdlib.get_logger(__name__)


class Leftovers:
    """Deletes them: once of all jobs, and then of those that have just ended."""

    def __init__(self, catalog: Catalog, store: ArtifactStore) -> None:
        self._catalog = catalog
        self._store = store
        self._since: datetime | None = None

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except ToileError as error:
                _log.warning("checkpoints are left behind", reason=error.reason)
            await asyncio.sleep(INTERVAL_SECONDS)

    def sweep(self) -> None:
        """Delete the checkpoints of trainings that failed or were cancelled.

        Raises:
            UnavailableError: The catalog or the artifact store does not answer; the next sweep
                does what this one did not.
        """
        begun = now()
        ended = select(JobRow.name).where(
            JobRow.kind == JobKind.TRAINING.value,
            JobRow.state.in_((JobState.FAILED.value, JobState.CANCELLED.value)),
        )
        if self._since is not None:
            ended = ended.where(JobRow.end_time >= self._since)
        with self._catalog.reading() as session:
            names = session.scalars(ended).all()
        for name in names:
            delete_folder(self._store, f"{name}/{CHECKPOINTS_FOLDER}")
        self._since = begun - _AGAIN
