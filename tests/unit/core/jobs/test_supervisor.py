"""What the supervisor makes of its jobs' records and of what compute says: any compute."""

from datetime import timedelta

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.clock import now
from toile.core.jobs import JobKind, JobState, JobStore
from toile.core.jobs.supervisor import JobSupervisor, submission_id
from toile.core.settings import Settings
from unit.core.jobs.fake_compute import FakeCompute


@pytest.fixture
def supervisor(settings: Settings, catalog: Catalog, compute: FakeCompute) -> JobSupervisor:
    settings = compute.pointed_at(settings.model_copy(update={"port": 1234}))
    return JobSupervisor(settings, catalog, JobKind.TRAINING, "toile.training")


def run(jobs: JobStore, job: str, attempt: int, *, heartbeat_seconds_ago: float = 0) -> None:
    """Do what the process of an attempt does first, then let time pass."""
    jobs.start(job, attempt)
    silence(jobs, job, heartbeat_seconds_ago)


def silence(jobs: JobStore, job: str, seconds: float) -> None:
    """Let the last sign of life be so long ago."""
    with jobs._catalog.transaction() as session:
        row = session.get_one(JobRow, job)
        row.heartbeat_time = now() - timedelta(seconds=seconds)


def test_queued_job_is_submitted_once(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    supervisor.reconcile()
    (submitted,) = compute.submitted()
    assert compute.command(submitted).endswith(f" -P -m toile.training {job} 1")
    variables = compute.variables(submitted)
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["TOILE_JOB_MAX_ATTEMPTS"] == "2"
    assert "TOILE_PORT" not in variables
    assert jobs.get(job).state == JobState.QUEUED


def test_another_kind_is_left_alone(
    settings: Settings, catalog: Catalog, compute: FakeCompute, job: str
) -> None:
    settings = compute.pointed_at(settings)
    JobSupervisor(settings, catalog, JobKind.DATASET_BUILD, "toile.dataset.build").reconcile()
    assert not compute.submitted()


def test_submission_that_is_refused_is_tried_again(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    compute.refuse = True
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.QUEUED
    compute.refuse = False
    supervisor.reconcile()
    assert compute.submitted() == [submission_id(job, 1)]


def test_living_process_is_left_alone(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1)
    compute.restart()
    supervisor.reconcile()
    assert (jobs.get(job).state, jobs.get(job).attempt) == ("RUNNING", 1)


def test_job_is_submitted_again_that_compute_forgot(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1, heartbeat_seconds_ago=6)
    compute.restart()
    supervisor.reconcile()
    row = jobs.get(job)
    assert (row.state, row.attempt) == ("QUEUED", 2)
    assert compute.forgotten in row.progress["message"]
    supervisor.reconcile()
    assert compute.submitted() == [submission_id(job, 2)]


def test_job_is_given_up_after_its_last_attempt(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    for attempt in (1, 2):
        supervisor.reconcile()
        run(jobs, job, attempt, heartbeat_seconds_ago=6)
        compute.say(
            submission_id(job, attempt),
            "FAILED",
            "exit code -9, last available logs (truncated):\nTraceback",
        )
        supervisor.reconcile()
    row = jobs.get(job)
    assert (row.state, row.error_reason) == ("FAILED", "COMPUTE_LOST")
    assert "exit code -9" in row.error_message
    assert "Traceback" not in row.error_message


def test_process_that_dies_before_it_starts_counts_as_an_attempt(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    compute.say(submission_id(job, 1), "FAILED", "no module")
    supervisor.reconcile()
    assert jobs.get(job).attempt == 2


def test_ended_job_stays_ended_whatever_compute_says(
    supervisor: JobSupervisor, compute: FakeCompute, catalog: Catalog, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1)
    with catalog.transaction() as session:
        jobs.succeed(session, job, 1)
    compute.restart()
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.SUCCEEDED


def test_compute_that_is_away(
    settings: Settings, catalog: Catalog, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor = JobSupervisor(compute.away(settings), catalog, JobKind.TRAINING, "toile.training")
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.QUEUED
    run(jobs, job, 1, heartbeat_seconds_ago=6)
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.RUNNING  # it may live yet
    with catalog.transaction() as session:
        session.get_one(JobRow, job).heartbeat_time = now() - timedelta(seconds=61)
    supervisor.reconcile()
    assert (jobs.get(job).state, jobs.get(job).attempt) == ("QUEUED", 2)


def test_silent_process_is_stopped_before_its_successor_starts(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1, heartbeat_seconds_ago=61)
    jobs.next_attempt(job, after=1, message="Ray went away")  # as while Ray did not answer
    compute.say(submission_id(job, 1), "RUNNING")
    supervisor.reconcile()
    assert compute.stopped == [submission_id(job, 1)]
    assert submission_id(job, 2) in compute.submitted()


def test_cancelled_process_that_hangs_is_stopped(
    supervisor: JobSupervisor,
    compute: FakeCompute,
    jobs: JobStore,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1)
    jobs.request_cancel(job)
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.RUNNING  # it has a while to notice
    monkeypatch.setattr("toile.core.jobs.supervisor.CANCEL_GRACE_SECONDS", 0.0)
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.CANCELLED
    assert compute.stopped == [submission_id(job, 1)]


@pytest.mark.parametrize("ask", ["request_cancel", "request_pause"])
def test_what_waits_for_compute_is_taken_back(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str, ask: str
) -> None:
    supervisor.reconcile()
    getattr(jobs, ask)(job)
    supervisor.reconcile()
    supervisor.reconcile()
    assert compute.stopped == [submission_id(job, 1)]


def test_process_that_was_paused_between_two_looks_leaves_by_itself(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1)
    jobs.request_pause(job)
    jobs.stop(job, attempt=1)
    supervisor.reconcile()
    assert not compute.stopped


def test_pausing_process_that_dies_leaves_a_paused_job(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1)
    jobs.request_pause(job)
    supervisor.reconcile()
    assert jobs.get(job).state == JobState.RUNNING  # it saves a checkpoint
    compute.say(submission_id(job, 1), "FAILED", "exit code -9")
    silence(jobs, job, 6)
    supervisor.reconcile()
    assert (jobs.get(job).state, jobs.get(job).attempt) == ("PAUSED", 1)


def test_resumed_job_is_submitted_and_may_be_lost_as_often_as_a_new_one(
    supervisor: JobSupervisor, compute: FakeCompute, jobs: JobStore, job: str
) -> None:
    supervisor.reconcile()
    run(jobs, job, 1)
    jobs.request_pause(job)
    jobs.stop(job, attempt=1)
    supervisor.reconcile()
    assert compute.submitted() == [submission_id(job, 1)], "a paused job is not started"
    jobs.resume(job)
    for attempt in (2, 3):
        supervisor.reconcile()
        run(jobs, job, attempt, heartbeat_seconds_ago=6)
        compute.say(submission_id(job, attempt), "FAILED", "exit code -9")
        supervisor.reconcile()
    row = jobs.get(job)
    assert (row.state, row.attempt) == ("FAILED", 3)
    assert "lost 2 times" in row.error_message
