"""A job's row and its history, and who may write them.

    QUEUED ─────start────→ RUNNING ─succeed→ SUCCEEDED
     │  ↑ └─ compute lost ──┘ │  ├────fail→ FAILED
   pause resume             pause └─cancel→ CANCELLED
     └→ PAUSED ←──────────────┘

A queued or paused job is cancelled at once. A job may be started several times, because compute
can be lost, or because it was paused and goes on. Each start has a number, the attempt, and only
the process of the current attempt may write: everything it writes, its target included, checks the
number in the same transaction (fencing). A process that lost its place gets `SupersededError`,
whatever it was doing, and has published nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobEventRow, JobRow
from toile.core.clock import now
from toile.core.context import new_id
from toile.core.errors import CancelledError, FailedPreconditionError, NotFoundError
from toile.core.jobs.costs import Usage, is_spent
from toile.core.jobs.states import FINAL_STATES, Asked, JobKind, JobState, SupersededError
from toile.core.names import JobName
from toile.core.settings import Prices

NOTHING, FREE = Usage(), Prices()
_MESSAGE_CHARACTERS = 1000


_ACTIVE_STATES = (JobState.QUEUED, JobState.RUNNING)
_TURNS = (JobRow.create_time, JobRow.name)
"""The order that supervisors start jobs in."""


class JobStore:
    """Reads and writes jobs. Methods that take a session join the caller's transaction."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def create(
        self,
        session: Session,
        *,
        project: str,
        kind: JobKind,
        target: str,
        spec: Mapping[str, Any],
        budget: float | None = None,
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
            budget=budget,
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
        """Return the jobs of a kind that run or should, oldest first, detached."""
        states = [state.value for state in _ACTIVE_STATES]
        statement = (
            select(JobRow)
            .where(JobRow.kind == kind.value, JobRow.state.in_(states))
            .order_by(*_TURNS)
        )
        with self._catalog.reading() as session:
            return list(session.scalars(statement))

    def queue_positions(self, names: Collection[str]) -> dict[str, int]:
        """Return the places of those jobs that are queued, each among its kind: 1 is next."""
        if not names:
            return {}
        place = func.row_number().over(partition_by=JobRow.kind, order_by=_TURNS)
        queue = (
            select(JobRow.name, place.label("place"))
            .where(JobRow.state == JobState.QUEUED.value)
            .subquery()
        )
        with self._catalog.reading() as session:
            found = session.execute(select(queue).where(queue.c.name.in_(names)))
            return {row.name: row.place for row in found}

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
    ) -> int:
        """Add an entry to the history, and bring the row up to it; returns its sequence number."""
        if state is not None:
            row.state = state.value
        if progress is not None:
            row.progress = progress
        last = session.scalar(
            select(func.max(JobEventRow.sequence)).where(JobEventRow.job == row.name)
        )
        sequence = (last or 0) + 1
        session.add(
            JobEventRow(job=row.name, sequence=sequence, state=row.state, progress=progress)
        )
        return sequence

    def request_cancel(self, name: str) -> JobRow:
        """Ask a job to stop; one that does not run ends at once, an ended one stays as it is."""
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if JobState(row.state) not in FINAL_STATES:
                row.cancel_requested = True
                if row.state != JobState.RUNNING:
                    self._end(session, row, JobState.CANCELLED)
            return row

    def request_pause(self, name: str) -> JobRow:
        """Ask a training to stop for now; one that does not run is paused at once.

        Only trainings keep checkpoints: another job would begin anew.

        Raises:
            FailedPreconditionError: The job has ended or was cancelled (`JOB_ENDED`), or is no
                training (`JOB_NOT_PAUSABLE`).
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.kind != JobKind.TRAINING:
                raise _refused(row, "only a training can be paused", "JOB_NOT_PAUSABLE")
            if JobState(row.state) in FINAL_STATES or row.cancel_requested:
                raise _refused(row, "the job has ended or was cancelled", "JOB_ENDED")
            if row.state == JobState.QUEUED:
                self._pause(session, row)
            elif row.state == JobState.RUNNING and not row.pause_requested:
                row.pause_requested = True
                self.append_event(session, row, progress={**row.progress, "message": "pausing"})
            return row

    def request_leave(self, name: str, attempt: int) -> bool:
        """Ask an attempt to keep what it has and make room for the next one.

        Returns whether it was asked: not one that is to stop anyway, or that is over, or that is
        no training and keeps nothing.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.attempt != attempt or row.state != JobState.RUNNING:
                return False
            if row.kind != JobKind.TRAINING or row.cancel_requested or row.pause_requested:
                return False
            row.leave_requested = True
            return True

    def request_samples(self, name: str) -> tuple[JobRow, int]:
        """Ask a training for samples; whoever asks while that is open gets the same ones.

        Returns the job, and the sequence number of the event after which the answer comes.

        Raises:
            FailedPreconditionError: The job is no training (`JOB_HAS_NO_SAMPLES`), or does not
                run (`JOB_NOT_RUNNING`).
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.kind != JobKind.TRAINING:
                raise _refused(row, "only a training draws samples", "JOB_HAS_NO_SAMPLES")
            if row.state != JobState.RUNNING or row.cancel_requested:
                raise _refused(row, "the job does not run", "JOB_NOT_RUNNING")
            row.samples_requested = True
            # Without what was said of samples before, which would look like the answer.
            progress = {k: v for k, v in row.progress.items() if k != "samples_step"}
            progress["message"] = "samples were asked for"
            return row, self.append_event(session, row, progress=progress)

    def resume(self, name: str, *, budget: float | None = None, prices: Prices = FREE) -> JobRow:
        """Queue a paused job again, under the next attempt, and with its attempts to lose again.

        Args:
            name: The job.
            budget: What it may cost from now on; None leaves it as it is.
            prices: Of what it took.

        Raises:
            FailedPreconditionError: The job is not paused, or not yet (`JOB_NOT_PAUSED`), or its
                budget is spent (`BUDGET_SPENT`).
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.state != JobState.PAUSED:
                raise _refused(row, "the job is not paused", "JOB_NOT_PAUSED")
            if budget is not None:
                row.budget = budget
            if is_spent(row, prices):
                raise _refused(row, f"its budget of {row.budget:g} is spent", "BUDGET_SPENT")
            self._follow(session, row)
            return row

    def stop(self, name: str, *, attempt: int) -> bool:
        """Record that the process of an attempt stopped as it was told.

        The job is cancelled, or paused, or queued for the attempt that follows one that left.

        Returns whether it did: the job may have ended, or a later attempt have started.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.attempt != attempt or JobState(row.state) not in _ACTIVE_STATES:
                return False
            if row.pause_requested and not row.cancel_requested:
                self._pause(session, row)
            elif row.leave_requested and not row.cancel_requested:
                self._follow(session, row)
            else:
                self._end(session, row, JobState.CANCELLED)
            return True

    def next_attempt(self, name: str, *, after: int, message: str = "") -> bool:
        """Open attempt `after + 1`, which shuts out the process of attempt `after`.

        Returns whether it did: another supervisor may have been quicker, or the job has ended or
        is paused.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            if row.attempt != after or JobState(row.state) not in _ACTIVE_STATES:
                return False
            row.attempt = after + 1
            row.leave_requested = False
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
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """End a job without a target. Returns whether it did: it may have ended, or be paused.

        With `attempt`, only while that attempt is the current one.
        """
        with self._catalog.transaction() as session:
            row = self._locked(session, name)
            stale = attempt is not None and row.attempt != attempt
            if stale or JobState(row.state) not in _ACTIVE_STATES:
                return False
            row.error_reason = reason
            row.error_message = " ".join(message.split())[:_MESSAGE_CHARACTERS]
            row.error_metadata = dict(metadata or {})
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
        """Record progress of a running attempt; samples that it tells of are what was asked for."""
        with self._catalog.transaction() as session:
            row = self.fence(session, name, attempt)
            row.heartbeat_time = now()
            if "samples_step" in progress:
                row.samples_requested = False
            self.append_event(session, row, progress=progress)

    def heartbeat(
        self, name: str, attempt: int, usage: Usage = NOTHING, prices: Prices = FREE
    ) -> Asked:
        """Show that the process of an attempt lives; returns what it is asked for.

        Raises:
            CancelledError: As `fence`.
        """
        with self._catalog.transaction() as session:
            row = self.fence(session, name, attempt)
            row.heartbeat_time = now()
            row.cpu_seconds += usage.cpu_seconds
            row.gpu_seconds += usage.gpu_seconds
            row.pause_requested |= is_spent(row, prices)
            to_stop = row.pause_requested or row.leave_requested
            return Asked(to_stop, row.samples_requested)

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

    def _follow(self, session: Session, row: JobRow) -> None:
        """Queue the next attempt; those before were not lost."""
        row.attempts_before_resume = row.attempt
        if row.attempt:  # a job that was never submitted gets its first from the supervisor
            row.attempt += 1
        row.leave_requested = False
        row.heartbeat_time = None
        self.append_event(session, row, state=JobState.QUEUED)

    def _pause(self, session: Session, row: JobRow) -> None:
        row.pause_requested = row.leave_requested = False
        # What it said last, and how long it still took, are of the attempt that is over.
        over = ("message", "seconds_left")
        progress = {key: value for key, value in row.progress.items() if key not in over}
        self.append_event(session, row, state=JobState.PAUSED, progress=progress)

    def _end(self, session: Session, row: JobRow, state: JobState) -> None:
        row.end_time = now()
        row.samples_requested = False
        self.append_event(session, row, state=state)


def _refused(row: JobRow, message: str, reason: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{message}: {row.name} is {row.state.lower()}",
        reason=reason,
        metadata={"job": row.name, "state": row.state},
    )


def _no_such_job(name: str) -> NotFoundError:
    return NotFoundError(f"{name} does not exist", reason="JOB_NOT_FOUND")
