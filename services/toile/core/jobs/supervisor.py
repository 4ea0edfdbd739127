"""Keeps jobs and the compute they run on in step. Not a scheduler: compute places and runs them.

Every replica of a service may run one: what they decide is settled by the job's row, and a
launcher takes a submission id once.
"""

import asyncio
import logging
import time
from collections.abc import Mapping

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.errors import ComputeUnavailableError, ToileError
from toile.core.jobs.failures import COMPUTE_LOST
from toile.core.jobs.launcher import open_launcher
from toile.core.jobs.records import JobStore
from toile.core.jobs.states import JobKind, JobState, heartbeat_age_seconds
from toile.core.names import JobName
from toile.core.settings import Settings

# A younger heartbeat proves that the process lives, so nobody need be asked.
FRESH_SECONDS = 5.0
# Without a heartbeat for so long the process hangs or its machine is cut off, whatever they say.
SILENT_SECONDS = 120.0
# The same while compute is away: there is nobody to ask, and the attempt number keeps it safe. On a
# machine that is overloaded both are slow to answer and yet alive.
SILENT_WITHOUT_COMPUTE_SECONDS = 60.0
# A cancelled process has so long to notice by itself.
CANCEL_GRACE_SECONDS = 15.0
_log = logging.getLogger(__name__)


class JobSupervisor:
    """Submits queued jobs of one kind, applies cancels, and starts again what was lost."""

    def __init__(
        self, settings: Settings, catalog: Catalog, kind: JobKind, entrypoint_module: str
    ) -> None:
        self._settings = settings
        self._kind = kind
        self._module = entrypoint_module
        self._jobs = JobStore(catalog)
        self._launcher = open_launcher(settings)
        self._cancel_seen: dict[str, float] = {}  # job → monotonic time
        self._waiting: dict[str, int] = {}  # job → attempt that was submitted and has not started
        self._compute_away = False

    async def run(self) -> None:
        """Reconcile until cancelled."""
        try:
            while True:
                try:
                    await asyncio.to_thread(self.reconcile)
                except Exception:  # noqa: BLE001 - a loop that dies silently strands every job
                    _log.exception("supervising %s jobs", self._kind)
                await asyncio.sleep(self._launcher.poll_interval_seconds)
        finally:
            self._launcher.close()

    def reconcile(self) -> None:
        """Bring every unfinished job one step further."""
        rows = self._jobs.active(self._kind)
        self._cancel_seen = {
            row.name: self._cancel_seen.get(row.name, time.monotonic())
            for row in rows
            if row.cancel_requested
        }
        self._give_back(rows)
        for row in rows:
            try:
                self._reconcile_one(row)
                self._compute_away = False
            except ComputeUnavailableError as error:
                if not self._compute_away:
                    _log.warning("jobs wait for compute: %s", error.message)
                self._compute_away = True
                self._without_compute(row)
            except ToileError as error:
                _log.warning("%s: %s", row.name, error.message)

    def _reconcile_one(self, row: JobRow) -> None:
        if row.cancel_requested and self._cancel(row):
            return
        if row.state == JobState.QUEUED:
            self._start(row)
        elif heartbeat_age_seconds(row) > FRESH_SECONDS:
            self._look_after(row)

    def _start(self, row: JobRow) -> None:
        if row.attempt == 0:
            if not self._jobs.next_attempt(row.name, after=0):
                return
            attempt = 1
        else:
            attempt = row.attempt
            known = self._launcher.get(submission_id(row.name, attempt))
            if known is not None:
                if known.ended:
                    self._lost(row, known.message)
                return
            self._stop_if_running(submission_id(row.name, attempt - 1))
        self._launcher.submit(
            submission_id(row.name, attempt),
            self._module,
            [row.name, str(attempt)],
            environment=self._environment(),
            labels=self._labels(row.name),
        )
        self._waiting[row.name] = attempt
        _log.info("submitted attempt %d of %s", attempt, row.name)

    def _stop_if_running(self, submission: str) -> None:
        """End an attempt that was given up but lives: it would use what its successor needs."""
        known = self._launcher.get(submission)
        if known is not None and not known.ended:
            self._launcher.stop(submission)

    def _give_back(self, active: list[JobRow]) -> None:
        """Stop what was submitted for jobs that were cancelled or paused before it started.

        Such a process would leave by itself, but a cluster may be made for it first.
        """
        names = {row.name for row in active}
        for name, attempt in list(self._waiting.items()):
            if name in names:
                continue
            try:
                if self._jobs.get(name).heartbeat_time is None:
                    self._stop_if_running(submission_id(name, attempt))
            except ComputeUnavailableError:
                continue  # later
            del self._waiting[name]
        for row in active:
            if row.state == JobState.QUEUED and row.attempt:
                self._waiting[row.name] = row.attempt
            else:
                self._waiting.pop(row.name, None)

    def _look_after(self, row: JobRow) -> None:
        known = self._launcher.get(submission_id(row.name, row.attempt))
        if known is None:
            self._lost(row, self._launcher.forgotten)
        elif known.ended:
            self._lost(row, known.message)
        elif known.suspended:
            # Once resumed, the same attempt would start again, which it may not.
            self._launcher.stop(submission_id(row.name, row.attempt))
            self._lost(row, known.message)
        elif heartbeat_age_seconds(row) > SILENT_SECONDS:
            self._launcher.stop(submission_id(row.name, row.attempt))
            self._lost(row, "the process gave no sign of life")

    def _without_compute(self, row: JobRow) -> None:
        running = row.state == JobState.RUNNING
        if running and heartbeat_age_seconds(row) > SILENT_WITHOUT_COMPUTE_SECONDS:
            self._lost(row, f"{self._launcher.compute} went away")

    def _lost(self, row: JobRow, why: str) -> None:
        """Give the job another attempt, or up. `row` may be stale: it may just have ended."""
        if row.pause_requested and self._jobs.stop(row.name, attempt=row.attempt):
            return  # resumed, it goes on from the checkpoint before
        why = first_line(why)
        attempts = self._settings.job_max_attempts
        tried = row.attempt - row.attempts_before_resume
        if tried >= attempts:
            self._jobs.finish(
                row.name,
                JobState.FAILED,
                attempt=row.attempt,
                reason=COMPUTE_LOST,
                message=f"its compute was lost {tried} times; last: {why}",
            )
            return
        message = f"compute was lost ({why}); start {tried + 1} of {attempts}"
        if self._jobs.next_attempt(row.name, after=row.attempt, message=message):
            _log.warning("%s: %s", row.name, message)

    def _cancel(self, row: JobRow) -> bool:
        """Stop a cancelled job that does not stop by itself; returns whether it is done with."""
        waited = time.monotonic() - self._cancel_seen[row.name]
        alive = heartbeat_age_seconds(row) <= FRESH_SECONDS
        if alive and waited < CANCEL_GRACE_SECONDS:
            return True
        # The row first: whatever happens to the process, it cannot publish any more.
        self._jobs.finish(row.name, JobState.CANCELLED, attempt=row.attempt)
        self._launcher.stop(submission_id(row.name, row.attempt))
        return True

    def _labels(self, name: str) -> Mapping[str, str]:
        job = JobName.parse(name)
        return {"project": job.project, "job": job.job, "kind": self._kind.value}

    def _environment(self) -> Mapping[str, str]:
        own = self._settings.environment()
        # Those are of this process, and a relative home would move with the working directory.
        not_theirs = (
            "TOILE_PORT",
            "TOILE_METRICS_PORT",
            "TOILE_READY_FILE",
            "TOILE_RAY_AUTH_TOKEN",
        )
        for name in not_theirs:
            own.pop(name, None)
        return {**own, "TOILE_HOME": str(self._settings.home_path), "RAY_USAGE_STATS_ENABLED": "0"}


def submission_id(name: str, attempt: int) -> str:
    """The id that an attempt of a job is submitted under."""
    return f"{name.rpartition('/')[2]}-{attempt}"


def first_line(text: str) -> str:
    """The first sentence of a message of Ray; what follows it is the tail of the log."""
    lines = text.strip().splitlines()
    return lines[0].split(", last available logs")[0][:200] if lines else "no reason given"
