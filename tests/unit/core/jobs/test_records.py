"""A job's life, and that only the current attempt may write."""

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import DatasetRow
from toile.core.errors import CancelledError, NotFoundError
from toile.core.jobs import JobState, JobStore, SupersededError
from toile.core.jobs.progress import progress_dict


def started(jobs: JobStore, job: str, attempt: int = 1) -> None:
    assert jobs.next_attempt(job, after=attempt - 1)
    jobs.start(job, attempt)


def publish(catalog: Catalog, jobs: JobStore, job: str, attempt: int) -> None:
    with catalog.transaction() as session:
        session.add(DatasetRow(name="projects/p/datasets/d", project="p", trigger_word="<d>"))
        jobs.succeed(session, job, attempt)


def published(catalog: Catalog) -> bool:
    with catalog.reading() as session:
        return session.get(DatasetRow, "projects/p/datasets/d") is not None


def test_history_of_a_job_that_succeeds(catalog: Catalog, jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.report(job, 1, progress_dict("train", 1, 2, loss=0.5))
    publish(catalog, jobs, job, 1)
    events, row = jobs.events_after(job, 0)
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    assert [event.state for event in events] == ["QUEUED", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert events[2].progress == {"phase": "train", "step": 1, "total_steps": 2, "loss": 0.5}
    assert row.state == JobState.SUCCEEDED
    assert row.start_time is not None
    assert row.end_time is not None
    assert published(catalog)


def test_events_after_a_sequence_number(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    events, _ = jobs.events_after(job, 1)
    assert [event.sequence for event in events] == [2]


def test_stale_attempt_publishes_nothing(catalog: Catalog, jobs: JobStore, job: str) -> None:
    started(jobs, job)
    assert jobs.next_attempt(job, after=1, message="lost")
    with pytest.raises(SupersededError):
        publish(catalog, jobs, job, 1)
    with pytest.raises(SupersededError):
        jobs.report(job, 1, progress_dict("train", 1, 2))
    with pytest.raises(SupersededError):
        jobs.start(job, 1)
    assert not jobs.finish(job, JobState.FAILED, attempt=1, reason="OLD", message="old")
    assert not published(catalog)
    jobs.start(job, 2)
    publish(catalog, jobs, job, 2)
    assert published(catalog)


def test_one_process_of_an_attempt_starts(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    with pytest.raises(SupersededError):
        jobs.start(job, 1)


def test_one_of_two_supervisors_opens_the_attempt(jobs: JobStore, job: str) -> None:
    assert jobs.next_attempt(job, after=0)
    assert not jobs.next_attempt(job, after=0)
    assert jobs.get(job).attempt == 1


def test_cancelled_job_publishes_nothing(catalog: Catalog, jobs: JobStore, job: str) -> None:
    started(jobs, job)
    assert jobs.request_cancel(job).state == JobState.RUNNING
    with pytest.raises(CancelledError):
        publish(catalog, jobs, job, 1)
    assert not published(catalog)


def test_cancelling_a_queued_job_ends_it(jobs: JobStore, job: str) -> None:
    assert jobs.request_cancel(job).state == JobState.CANCELLED
    assert not jobs.next_attempt(job, after=0)


def test_cancelling_an_ended_job_changes_nothing(jobs: JobStore, job: str) -> None:
    assert jobs.finish(job, JobState.FAILED, reason="DISK_FULL", message="no space\nleft")
    row = jobs.request_cancel(job)
    assert (row.state, row.error_reason, row.error_message) == (
        "FAILED",
        "DISK_FULL",
        "no space left",
    )
    assert len(jobs.events_after(job, 0)[0]) == 2


def test_lost_job_says_so_and_keeps_its_progress(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.report(job, 1, progress_dict("train", 7, 9))
    jobs.next_attempt(job, after=1, message="compute was lost")
    events, row = jobs.events_after(job, 3)
    assert [(event.state, event.progress) for event in events] == [
        ("QUEUED", {"phase": "train", "step": 7, "total_steps": 9, "message": "compute was lost"})
    ]
    assert row.progress["step"] == 7


def test_unknown_job(jobs: JobStore) -> None:
    with pytest.raises(NotFoundError):
        jobs.get("projects/p/jobs/none")
    with pytest.raises(NotFoundError):
        jobs.request_cancel("projects/p/jobs/none")


def test_unknown_figure_is_refused() -> None:
    with pytest.raises(TypeError, match="accuracy"):
        progress_dict("train", 1, 2, accuracy=1.0)
