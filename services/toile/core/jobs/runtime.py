"""Inside a job's process: its context, its heartbeat, and how it ends.

A job module's `__main__` is `run_job(work)`. The supervisor starts it as
`python -m {module} {job name} {attempt}`.

How the process ends, and what the supervisor makes of it: a final state or a pause was recorded
(exit 0); SIGTERM that nobody asked for, or a cluster that ended around it (exit 75: the next
attempt goes on); killed (the same).
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy.orm import Session

from toile.core import context
from toile.core import logging as core_logging
from toile.core.artifacts import ArtifactStore, open_store
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.errors import CancelledError, ToileError, UnavailableError
from toile.core.jobs.costs import Meter, Usage
from toile.core.jobs.failures import describe, is_compute_lost
from toile.core.jobs.progress import Figure, progress_dict
from toile.core.jobs.records import JobStore
from toile.core.jobs.states import JobState, SupersededError
from toile.core.names import JobName
from toile.core.settings import Settings

HEARTBEAT_INTERVAL_SECONDS = 1.0
SUPERSEDED_GRACE_SECONDS = 30.0
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start me again
_log = logging.getLogger(__name__)


class StoppedError(KeyboardInterrupt):
    """SIGTERM: leave at once, another attempt goes on.

    A KeyboardInterrupt, for Ray ends its waits for no other exception of a signal handler; what it
    then raises is a plain one.
    """


class JobContext:
    """What a job's work needs to know, and how it tells of itself.

    Also made in processes that work on behalf of the job's own, such as a Ray Train worker: they
    hold the same attempt and are fenced alike.
    """

    def __init__(
        self, settings: Settings, catalog: Catalog, store: ArtifactStore, name: str, attempt: int
    ) -> None:
        self.settings = settings
        self.catalog = catalog
        self.store = store
        self.name = name
        self.attempt = attempt
        self.jobs = JobStore(catalog)
        row = self.jobs.get(name)
        self.project: str = row.project
        self.target: str = row.target
        self.spec: dict[str, Any] = row.spec
        self._lost: CancelledError | None = None
        self._pausing = False
        self._samples_wanted = False

    @property
    def scratch_path(self) -> Path:
        """A folder of this job's for files of passing use."""
        path = self.settings.home_path / "scratch" / self.name.rpartition("/")[2]
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def cache_path(self) -> Path:
        """The folder that published artifacts are fetched into."""
        path = self.settings.home_path / "cache"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def report(self, phase: str, step: int, total_steps: int, **figures: Figure) -> None:
        """Record progress; `progress.PROGRESS_FIGURES` are the figures.

        Raises:
            CancelledError: The job should stop.
        """
        self.jobs.report(
            self.name, self.attempt, progress_dict(phase, step, total_steps, **figures)
        )
        if "samples_step" in figures:
            self._samples_wanted = False

    def current(self) -> bool:
        """Say whether the job runs and this is its latest attempt, by the catalog.

        Raises:
            CatalogUnavailableError: The catalog does not answer.
        """
        row = self.jobs.get(self.name)
        return row.state == JobState.RUNNING and row.attempt == self.attempt

    def cancelled(self) -> bool:
        """Say whether the job should stop for good; cheap, at most a second behind."""
        return self._lost is not None

    def stopping(self) -> bool:
        """Say whether the job should stop, for good or for now; as `cancelled`."""
        return self._pausing or self.cancelled()

    def samples_wanted(self) -> bool:
        """Say whether somebody asked for samples; cheap, at most a second behind.

        So it may still say so of a request that was answered a moment ago: see `samples_asked`.
        """
        return self._samples_wanted

    def samples_asked(self) -> bool:
        """Say whether a request for samples is open, by the catalog.

        Raises:
            CatalogUnavailableError: The catalog does not answer.
        """
        self._samples_wanted = self.jobs.get(self.name).samples_requested
        return self._samples_wanted

    def check(self) -> None:
        """Raise if the job should stop, for good or for now.

        Raises:
            CancelledError: Somebody asked for it.
            SupersededError: The job ended, or a later attempt has started.
        """
        if self._lost is not None:
            raise self._lost
        if self._pausing:
            raise CancelledError(f"{self.name} was asked to stop for now")

    def succeed(self, session: Session) -> None:
        """End the job as succeeded in the transaction that publishes its target.

        Raises:
            CancelledError: The job was cancelled or superseded; the transaction must not commit.
        """
        self.jobs.succeed(session, self.name, self.attempt)

    def fail(self, error: BaseException) -> bool:
        """End the job as failed, or cancelled, or pause it. Returns whether this very call did."""
        if isinstance(error, SupersededError):
            return False
        if isinstance(error, CancelledError):
            return self.jobs.stop(self.name, attempt=self.attempt)
        failure = describe(error)
        return self.jobs.finish(
            self.name,
            JobState.FAILED,
            attempt=self.attempt,
            reason=failure.reason,
            message=failure.message,
            metadata=failure.metadata,
        )

    @contextlib.contextmanager
    def heartbeat(self, gpus: int = 0) -> Iterator[None]:
        """Show life while the block runs, and what it takes; learn of what is asked of it.

        Args:
            gpus: That this process holds.
        """
        stop, meter = threading.Event(), Meter(gpus)
        thread = threading.Thread(
            target=self._beat, args=(stop, meter), name="heartbeat", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _beat(self, stop: threading.Event, meter: Meter) -> None:
        untold = Usage()
        while not stop.wait(HEARTBEAT_INTERVAL_SECONDS):
            untold += meter.read()
            try:
                self._pausing, self._samples_wanted = self.jobs.heartbeat(
                    self.name, self.attempt, untold, self.settings.prices
                )
                untold = Usage()
            except CancelledError as error:
                self._lost = error
                if isinstance(error, SupersededError) and not stop.wait(SUPERSEDED_GRACE_SECONDS):
                    # It cannot publish any more, but it would use what its successor needs.
                    _log.error("ended: %s", error.message)
                    os._exit(0)
                return
            except ToileError as error:  # the catalog is away: the work itself may not notice
                _log.warning("heartbeat: %s", error.message)
            except Exception:  # noqa: BLE001 - without a heartbeat the job would be started again
                _log.exception("heartbeat")


@contextlib.contextmanager
def opened(settings: Settings, name: str, attempt: int) -> Iterator[JobContext]:
    """Open catalog and artifacts for a job's process."""
    catalog = open_catalog(settings)
    try:
        with context.bind(project=JobName.parse(name).project, job=name):
            yield JobContext(settings, catalog, open_store(settings), name, attempt)
    finally:
        catalog.close()


def run_job(work: Callable[[JobContext], None]) -> None:
    """Be the main function of a job's process; exits the process."""
    settings = Settings()
    core_logging.configure(settings, "job")
    name, attempt = sys.argv[1], int(sys.argv[2])
    sys.exit(execute(work, settings, name, attempt))


def execute(work: Callable[[JobContext], None], settings: Settings, name: str, attempt: int) -> int:
    """Take a job, do its work, record how it ended; return the process's exit code."""
    with opened(settings, name, attempt) as job:
        try:
            job.jobs.start(name, attempt)
        except SupersededError as error:
            _log.warning("%s", error.message)
            return 0
        with job.heartbeat(), _terminable():
            try:
                work(job)
            except KeyboardInterrupt:
                # A Ray job is stopped by SIGTERM, also when it is cancelled.
                return 0 if _stop_if_asked(job) else STOPPED_EXIT_CODE
            except Exception as error:  # noqa: BLE001 - the one place that names failures
                if is_compute_lost(error):
                    _log.warning("compute was lost: %s", type(error).__name__)
                    return STOPPED_EXIT_CODE
                _record(job, error)
                return 0
        if job.current():
            _record(job, RuntimeError("the work returned without publishing its target"))
    return 0


def _record(job: JobContext, error: BaseException) -> None:
    """Record a failure; a catalog that is away for a moment must not turn it into a lost job."""
    for pause_seconds in (0.5, 2.0, 5.0, None):
        try:
            if job.fail(error):
                _log.info("job ended: %s", type(error).__name__)
            return
        except UnavailableError:
            if pause_seconds is None:
                raise
            time.sleep(pause_seconds)


def _stop_if_asked(job: JobContext) -> bool:
    row = job.jobs.get(job.name)
    if not (row.cancel_requested or row.pause_requested):
        return False
    job.jobs.stop(job.name, attempt=job.attempt)
    return True


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into `StoppedError`; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    install_stop_handler()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def install_stop_handler() -> None:
    """Make SIGTERM raise `StoppedError`; again after `ray.init`, which installs its own."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(STOPPED_EXIT_CODE))
        raise StoppedError

    signal.signal(signal.SIGTERM, stop)
