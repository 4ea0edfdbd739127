"""A job's row and its history, and who may write them.

    QUEUED ─start→ RUNNING ─succeed→ SUCCEEDED
      ↑  └─────────── requeue ──┘ ├──fail→ FAILED
      └ compute lost              └─cancel→ CANCELLED

A job may be started several times, because compute can be lost. Each start has a number, the
attempt, and only the process of the current attempt may write: everything it writes, its target
included, checks the number in the same transaction (fencing). A process that lost its place gets
`SupersededError`, whatever it was doing, and has published nothing.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobEventRow, JobRow
from toile.core.clock import now
from toile.core.context import new_id
from toile.core.errors import CancelledError, NotFoundError
from toile.core.names import JobName

_MESSAGE_CHARACTERS = 1000
PROGRESS_FIGURES = frozenset(
    {"loss", "learning_rate", "images_per_second", "seconds_left", "message"}
)


class JobKind(StrEnum):
    """What a job does."""

    DATASET_BUILD = "DATASET_BUILD"
    TRAINING = "TRAINING"


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class SupersededError(CancelledError):
    """A process that may no longer write: the job ended, or a later attempt has started."""

    default_reason = "SUPERSEDED"


def progress_dict(
    phase: str, step: int, total_steps: int, **figures: float | str
) -> dict[str, Any]:
    """One report of progress, as rows hold it; the keys are those of `toile.v1.JobProgress`."""
    unknown = figures.keys() - PROGRESS_FIGURES
    if unknown:
        raise TypeError(f"progress has no figure {sorted(unknown)}")
    return {"phase": phase, "step": step, "total_steps": total_steps, **figures}


class JobStore:
    """Reads and writes jobs. Methods that take a session join the caller's transaction."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def create(
        self, session: Session, *, project: str, kind: JobKind, target: str, spec: Mapping[str, Any]
    ) -> JobRow:
        """Record a queued job; the supervisor of its kind starts it after the commit."""
        row = JobRow(
            name=str(JobName(project, new_id())),
            project=project,
            kind=kind.value,
            state=JobState.QUEUED.value,
            target=target,
            spec=dict(spec),
            progress={},
            attempt=0,
            cancel_requested=False,
        )
        session.add(row)
        session.flush()
        self.append_event(session, row)
        return row

    def get(self, name: str) -> JobRow:
        """Return a job, detached.

        Raises:
            NotFoundError: There is none of this name.
        """
        with self._catalog.reading() as session:
            row = session.get(JobRow, name)
        if row is None:
            raise _no_such_job(name)
        return row

    def active(self, kind: JobKind) -> list[JobRow]:
        """Return the jobs of a kind that have not ended, oldest first, detached."""
        states = [JobState.QUEUED.value, JobState.RUNNING.value]
        statement = (
            select(JobRow)
            .where(JobRow.kind == kind.value, JobRow.state.in_(states))
            .order_by(JobRow.create_time, JobRow.name)
        )
        with self._catalog.reading() as session:
            return list(session.scalars(statement))

    def events_after(self, name: str, sequence: int) -> tuple[list[JobEventRow], JobRow]:
        """Return the events after a sequence number, and the job, no older than the last of them.

        Raises:
            NotFoundError: There is no job of this name.
        """
        statement = (
            select(JobEventRow)
            .where(JobEventRow.job == name, JobEventRow.sequence > sequence)
            .order_by(JobEventRow.sequence)
        )
        with self._catalog.reading() as session:
            events = list(session.scalars(statement))
            row = session.get(JobRow, name)
        if row is None:
            raise _no_such_job(name)
        return events, row

    def append_event(
        self,
        session: Session,
        row: JobRow,
        *,
        state: JobState | None = None,
        progress: dict[str, Any] | None = None,
    ) -> None:
        """Add an entry to the history, and bring the row up to it."""
        if state is not None:
            row.state = state.value
        if progress is not None:
            row.progress = progress
        last = session.scalar(
            select(func.max(JobEventRow.sequence)).where(JobEventRow.job == row.name)
        )
        session.add(
            JobEventRow(job=row.name, sequence=(last or 0) + 1, state=row.state, progress=progress)
        )

    def request_cancel(self, name: str) -> JobRow:
        """Ask a job to stop; one that has not started ends at once, an ended one stays as it is."""
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if JobState(row.state) not in FINAL_STATES:
                row.cancel_requested = True
                if row.state == JobState.QUEUED:
                    self._end(session, row, JobState.CANCELLED)
            return row

    def next_attempt(self, name: str, *, after: int, message: str = "") -> bool:
        """Open attempt `after + 1`, which shuts out the process of attempt `after`.

        Returns whether it did: another supervisor may have been quicker, or the job has ended.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.attempt != after or JobState(row.state) in FINAL_STATES:
                return False
            row.attempt = after + 1
            row.heartbeat_time = None
            progress = {**row.progress, "message": message} if message else None
            if progress is not None or row.state != JobState.QUEUED:
                self.append_event(session, row, state=JobState.QUEUED, progress=progress)
            return True

    def finish(
        self,
        name: str,
        state: JobState,
        *,
        attempt: int | None = None,
        reason: str = "",
        message: str = "",
    ) -> bool:
        """End a job without a target. Returns whether it did: it may have ended otherwise.

        With `attempt`, only while that attempt is the current one.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            stale = attempt is not None and row.attempt != attempt
            if stale or JobState(row.state) in FINAL_STATES:
                return False
            row.error_reason = reason
            row.error_message = " ".join(message.split())[:_MESSAGE_CHARACTERS]
            self._end(session, row, state)
            return True

    def start(self, name: str, attempt: int) -> JobRow:
        """Take the job for the process of an attempt.

        Raises:
            SupersededError: The job has ended, or another process has it.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.attempt != attempt or row.state != JobState.QUEUED:
                raise SupersededError(f"attempt {attempt} of {name} may not start")
            row.start_time = row.start_time or now()
            row.heartbeat_time = now()
            self.append_event(session, row, state=JobState.RUNNING)
            return row

    def report(self, name: str, attempt: int, progress: dict[str, Any]) -> None:
        """Record progress of a running attempt."""
        with self._catalog.transaction() as session:
            row = self.fence(session, name, attempt)
            row.heartbeat_time = now()
            self.append_event(session, row, progress=progress)

    def heartbeat(self, name: str, attempt: int) -> None:
        """Show that the process of an attempt lives."""
        with self._catalog.transaction() as session:
            self.fence(session, name, attempt).heartbeat_time = now()

    def succeed(self, session: Session, name: str, attempt: int) -> None:
        """End a job in the transaction that publishes its target."""
        row = self.fence(session, name, attempt)
        row.progress = {**row.progress, "seconds_left": 0.0}
        self._end(session, row, JobState.SUCCEEDED)

    def fence(self, session: Session, name: str, attempt: int) -> JobRow:
        """Return the job, locked, if the process of this attempt may still write.

        Raises:
            SupersededError: The job has ended, or a later attempt has started.
            CancelledError: Somebody asked the job to stop.
        """
        row = self._locked(session, name)
        if row.attempt != attempt or row.state != JobState.RUNNING:
            raise SupersededError(f"attempt {attempt} of {name} was superseded")
        if row.cancel_requested:
            raise CancelledError(f"{name} was cancelled")
        return row

    def _locked(self, session: Session, name: str) -> JobRow:
        row = session.get(JobRow, name, with_for_update=True)
        if row is None:
            raise _no_such_job(name)
        return row

    def _end(self, session: Session, row: JobRow, state: JobState) -> None:
        row.end_time = now()
        self.append_event(session, row, state=state)


def heartbeat_age_seconds(row: JobRow, at: datetime | None = None) -> float:
    """Seconds since the job's process last showed that it lives; infinite if it never did."""
    if row.heartbeat_time is None:
        return float("inf")
    return ((at or now()) - row.heartbeat_time).total_seconds()


def _no_such_job(name: str) -> NotFoundError:
    return NotFoundError(f"{name} does not exist", reason="JOB_NOT_FOUND")
