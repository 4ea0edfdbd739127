"""How a job's process ends, and what its job's record then says."""

import errno
import os
import signal
import time
from collections.abc import Callable

import pytest
from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    OwnerDiedError,
    RayTaskError,
    WorkerCrashedError,
)
from safetensors import SafetensorError

from toile.core.errors import StoreUnavailableError
from toile.core.jobs import JobState, JobStore, runtime
from toile.core.jobs.runtime import STOPPED_EXIT_CODE, JobContext, execute
from toile.core.settings import Settings

Work = Callable[[JobContext], None]


@pytest.fixture(autouse=True)
def quick_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HEARTBEAT_INTERVAL_SECONDS", 0.02)


@pytest.fixture
def run(settings: Settings, jobs: JobStore, job: str) -> Callable[[Work], int]:
    def run(work: Work) -> int:
        jobs.next_attempt(job, after=0)
        return execute(work, settings, job, 1)

    return run


def test_work_that_publishes(run: Callable[[Work], int], jobs: JobStore, job: str) -> None:
    def work(context: JobContext) -> None:
        assert context.spec == {"answer": 42}
        context.report("count", 1, 1)
        with context.catalog.transaction() as session:
            context.succeed(session)

    assert run(work) == 0
    assert jobs.get(job).state == JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreUnavailableError("the store is away"), "STORE_UNAVAILABLE"),
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "DISK_FULL"),
        (MemoryError(), "OUT_OF_MEMORY"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "OUT_OF_MEMORY"),
        (ValueError("password is hunter2"), "INTERNAL"),
    ],
)
def test_failures_have_reasons(
    run: Callable[[Work], int], jobs: JobStore, job: str, error: Exception, reason: str
) -> None:
    def work(context: JobContext) -> None:
        raise error

    assert run(work) == 0
    row = jobs.get(job)
    assert (row.state, row.error_reason) == ("FAILED", reason)
    assert "\n" not in row.error_message
    assert "hunter2" not in row.error_message


def test_cause_of_a_wrapped_error_counts(
    run: Callable[[Work], int], jobs: JobStore, job: str
) -> None:
    def work(context: JobContext) -> None:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise RuntimeError("while saving") from error

    run(work)
    assert jobs.get(job).error_reason == "DISK_FULL"


def test_work_that_forgets_to_publish_fails(
    run: Callable[[Work], int], jobs: JobStore, job: str
) -> None:
    run(lambda _: None)
    assert jobs.get(job).state == JobState.FAILED


def wait_until_told(context: JobContext) -> None:
    deadline = time.monotonic() + 20
    while not context.stopping():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    context.check()


def test_cancel_reaches_the_work(run: Callable[[Work], int], jobs: JobStore, job: str) -> None:
    def work(context: JobContext) -> None:
        jobs.request_cancel(job)
        wait_until_told(context)

    assert run(work) == 0
    assert jobs.get(job).state == JobState.CANCELLED


def test_pause_reaches_the_work_which_lives_on_while_it_saves(
    run: Callable[[Work], int], jobs: JobStore, job: str
) -> None:
    def work(context: JobContext) -> None:
        jobs.request_pause(job)
        try:
            wait_until_told(context)
        finally:
            assert not context.cancelled()
            told = jobs.get(job).heartbeat_time
            deadline = time.monotonic() + 20
            while jobs.get(job).heartbeat_time == told:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    assert run(work) == 0
    assert jobs.get(job).state == JobState.PAUSED


def test_superseded_process_leaves_the_job_to_its_successor(
    run: Callable[[Work], int], jobs: JobStore, job: str
) -> None:
    def work(context: JobContext) -> None:
        jobs.next_attempt(job, after=1, message="lost")
        wait_until_told(context)

    assert run(work) == 0
    row = jobs.get(job)
    assert (row.state, row.attempt) == ("QUEUED", 2)


def test_process_that_may_not_start_does_nothing(
    settings: Settings, jobs: JobStore, job: str
) -> None:
    jobs.next_attempt(job, after=0)
    jobs.request_cancel(job)

    def work(context: JobContext) -> None:
        pytest.fail("it worked")

    assert execute(work, settings, job, 1) == 0
    assert jobs.get(job).state == JobState.CANCELLED


def test_sigterm_leaves_the_job_for_another_attempt(
    run: Callable[[Work], int], jobs: JobStore, job: str
) -> None:
    def work(context: JobContext) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    assert run(work) == STOPPED_EXIT_CODE
    assert jobs.get(job).state == JobState.RUNNING


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        WorkerCrashedError(),
        LocalRayletDiedError(),
        OwnerDiedError("ff" * 28, None, "somewhere"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_cluster_that_ends_leaves_the_job_for_another_attempt(
    run: Callable[[Work], int], jobs: JobStore, job: str, error: Exception
) -> None:
    def work(context: JobContext) -> None:
        raise ValueError("nothing came back") from error

    assert run(work) == STOPPED_EXIT_CODE
    assert jobs.get(job).state == JobState.RUNNING


def test_an_actor_that_cannot_start_fails_the_job(
    run: Callable[[Work], int], jobs: JobStore, job: str
) -> None:
    why = RayTaskError("Actor.__init__", "its trace", ValueError("no such file"))

    def work(context: JobContext) -> None:
        raise ActorDiedError(why)

    assert run(work) == 0
    row = jobs.get(job)
    assert (row.state, row.error_reason) == (JobState.FAILED, "INTERNAL")


@pytest.mark.parametrize(
    ("ask", "state"),
    [(JobStore.request_cancel, "CANCELLED"), (JobStore.request_pause, "PAUSED")],
)
def test_sigterm_of_a_job_that_should_stop_stops_it(
    run: Callable[[Work], int],
    jobs: JobStore,
    job: str,
    ask: Callable[[JobStore, str], object],
    state: str,
) -> None:
    def work(context: JobContext) -> None:
        ask(jobs, job)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    assert run(work) == 0
    assert jobs.get(job).state == state


def test_heartbeat_shows_life(run: Callable[[Work], int], jobs: JobStore, job: str) -> None:
    def work(context: JobContext) -> None:
        first = jobs.get(job).heartbeat_time
        deadline = time.monotonic() + 20
        while jobs.get(job).heartbeat_time == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    run(work)
