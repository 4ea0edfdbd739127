"""A training that is paused and goes on: its record."""

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.errors import FailedPreconditionError
from toile.core.jobs import JobKind, JobState, JobStore, SupersededError
from toile.core.jobs.progress import progress_dict


def started(jobs: JobStore, job: str) -> None:
    assert jobs.next_attempt(job, after=0)
    jobs.start(job, 1)


def test_a_queued_job_is_paused_at_once(jobs: JobStore, job: str) -> None:
    jobs.next_attempt(job, after=0)  # its process may be on its way
    assert jobs.request_pause(job).state == JobState.PAUSED
    with pytest.raises(SupersededError):
        jobs.start(job, 1)
    assert not jobs.next_attempt(job, after=1)
    assert jobs.active(JobKind.TRAINING) == []


def test_a_running_job_is_paused_when_its_process_has_stopped(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.report(job, 1, progress_dict("train", 3, 9, loss=0.5, seconds_left=8.0))
    for _ in range(2):
        row = jobs.request_pause(job)
        assert (row.state, row.progress["message"]) == ("RUNNING", "pausing")
    jobs.report(job, 1, progress_dict("train", 4, 9))  # the step that it was in
    assert jobs.heartbeat(job, 1).to_stop
    assert jobs.stop(job, attempt=1)
    events, row = jobs.events_after(job, 2)
    assert [event.state for event in events] == ["RUNNING", "RUNNING", "RUNNING", "PAUSED"]
    assert row.progress == {"phase": "train", "step": 4, "total_steps": 9}
    assert row.end_time is None
    assert jobs.request_pause(job).state == JobState.PAUSED
    assert not jobs.stop(job, attempt=1)


def test_a_resumed_job_is_queued_under_the_next_attempt(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.request_pause(job)
    jobs.stop(job, attempt=1)
    row = jobs.resume(job)
    assert (row.state, row.attempt) == ("QUEUED", 2)
    with pytest.raises(SupersededError):
        jobs.report(job, 1, progress_dict("train", 5, 9))
    jobs.start(job, 2)
    assert not jobs.heartbeat(job, 2).to_stop, "the pause is over"


def test_a_job_that_was_about_to_end_ends(catalog: Catalog, jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.request_pause(job)
    with catalog.transaction() as session:
        jobs.succeed(session, job, 1)
    assert jobs.get(job).state == JobState.SUCCEEDED


def test_cancel_wins_over_pause(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.request_pause(job)
    jobs.request_cancel(job)
    assert jobs.stop(job, attempt=1)
    assert jobs.get(job).state == JobState.CANCELLED


def test_a_paused_job_can_be_cancelled(jobs: JobStore, job: str) -> None:
    jobs.request_pause(job)
    row = jobs.request_cancel(job)
    assert row.state == JobState.CANCELLED
    assert row.end_time is not None


def test_what_cannot_be_paused(catalog: Catalog, jobs: JobStore, job: str) -> None:
    with catalog.transaction() as session:
        build = jobs.create(
            session, project="p", kind=JobKind.DATASET_BUILD, target="t", spec={}
        ).name
    started(jobs, job)
    jobs.request_cancel(job)
    for name, reason in [(build, "JOB_NOT_PAUSABLE"), (job, "JOB_ENDED")]:
        with pytest.raises(FailedPreconditionError) as caught:
            jobs.request_pause(name)
        assert caught.value.reason == reason
    jobs.stop(job, attempt=1)
    with pytest.raises(FailedPreconditionError):
        jobs.request_pause(job)
    assert jobs.get(job).state == JobState.CANCELLED


def test_what_cannot_be_resumed(jobs: JobStore, job: str) -> None:
    def refused() -> None:
        with pytest.raises(FailedPreconditionError) as caught:
            jobs.resume(job)
        assert caught.value.reason == "JOB_NOT_PAUSED"

    refused()
    started(jobs, job)
    jobs.request_pause(job)
    refused()  # not yet
    jobs.request_cancel(job)
    jobs.stop(job, attempt=1)
    refused()


def test_an_attempt_that_leaves_is_followed_by_the_next(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.report(job, 1, progress_dict("train", 3, 9))
    assert not jobs.heartbeat(job, 1).to_stop
    assert jobs.request_leave(job, 1)
    assert jobs.heartbeat(job, 1).to_stop
    assert jobs.stop(job, attempt=1)
    row = jobs.get(job)
    assert (row.state, row.attempt, row.leave_requested) == ("QUEUED", 2, False)
    assert row.attempts_before_resume == 1, "it was not lost"
    assert not jobs.next_attempt(job, after=1, message="its process ended")
    jobs.start(job, 2)
    assert not jobs.heartbeat(job, 2).to_stop


def test_an_attempt_that_dies_as_it_leaves_was_lost(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.request_leave(job, 1)
    assert jobs.next_attempt(job, after=1)
    jobs.start(job, 2)
    assert not jobs.heartbeat(job, 2).to_stop
    assert jobs.get(job).attempts_before_resume == 0


def test_who_is_not_asked_to_leave(catalog: Catalog, jobs: JobStore, job: str) -> None:
    with catalog.transaction() as session:
        build = jobs.create(
            session, project="p", kind=JobKind.DATASET_BUILD, target="t", spec={}
        ).name
    started(jobs, build)
    assert not jobs.request_leave(build, 1), "it keeps nothing"
    assert not jobs.request_leave(job, 0), "it does not run"
    started(jobs, job)
    assert not jobs.request_leave(job, 2), "another attempt"
    jobs.request_pause(job)
    assert not jobs.request_leave(job, 1), "it stops anyway"
    jobs.stop(job, attempt=1)
    assert jobs.get(job).state == JobState.PAUSED


def test_cancel_wins_over_leaving(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.request_leave(job, 1)
    jobs.request_cancel(job)
    assert jobs.stop(job, attempt=1)
    assert jobs.get(job).state == JobState.CANCELLED
