"""Logs of jobs: of which attempts, how much of them, and how they are followed."""

from collections.abc import AsyncIterator

import pytest

from toile.core.errors import ComputeUnavailableError
from toile.core.jobs import JobState, JobStore, logs
from toile.core.jobs.logs import JobLogs, LogChunk, tail
from toile.core.jobs.ray_jobs import RayJobs
from toile.core.jobs.supervisor import submission_id
from unit.core.jobs.fake_ray import FakeRay


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FOLLOW_INTERVAL_SECONDS", 0.02)


@pytest.fixture
def reader(jobs: JobStore, ray: FakeRay) -> JobLogs:
    return JobLogs(jobs, RayJobs(ray.url))


def attempt(
    jobs: JobStore, ray: FakeRay, job: str, number: int, text: str, status: str = "RUNNING"
) -> str:
    """Open an attempt that prints something; returns its id in Ray."""
    assert jobs.next_attempt(job, after=number - 1, message="lost" if number > 1 else "")
    name = submission_id(job, number)
    ray.jobs[name] = {"status": status}
    ray.logs[name] = text
    return name


async def everything(chunks: AsyncIterator[LogChunk]) -> list[LogChunk]:
    return [chunk async for chunk in chunks]


async def test_attempts_come_in_their_order_as_far_as_they_are_kept(
    reader: JobLogs, jobs: JobStore, ray: FakeRay, job: str
) -> None:
    forgotten = attempt(jobs, ray, job, 1, "one\n")
    ray.lost_machines.add(attempt(jobs, ray, job, 2, "two\n"))
    attempt(jobs, ray, job, 3, "three\n")
    attempt(jobs, ray, job, 4, "four\n")
    del ray.jobs[forgotten]
    got = await everything(reader.read(job, follow=False, tail_lines=0))
    assert got == [(3, "three\n"), (4, "four\n")]


async def test_a_job_that_never_started_has_none(jobs: JobStore, job: str) -> None:
    reader = JobLogs(jobs, RayJobs(""))  # nothing is asked of Ray
    assert await everything(reader.read(job, follow=False, tail_lines=5)) == []
    jobs.request_cancel(job)
    assert await everything(reader.read(job, follow=True, tail_lines=0)) == []


async def test_ray_that_is_away_is_named(jobs: JobStore, job: str) -> None:
    jobs.next_attempt(job, after=0)
    with pytest.raises(ComputeUnavailableError):
        await everything(JobLogs(jobs, RayJobs("")).read(job, follow=False, tail_lines=0))


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (1, [(2, "d")]),
        (2, [(2, "c\nd")]),
        (3, [(1, "b\n"), (2, "c\nd")]),
        (9, [(1, "a\nb\n"), (2, "c\nd")]),
    ],
)
def test_last_lines_may_be_of_several_attempts(lines: int, kept: list[tuple[int, str]]) -> None:
    assert tail([LogChunk(1, "a\nb\n"), LogChunk(2, "c\nd")], lines) == kept


async def test_following_goes_on_over_a_pause_to_the_end(
    reader: JobLogs, jobs: JobStore, ray: FakeRay, job: str
) -> None:
    first = attempt(jobs, ray, job, 1, "old\nstep 1\n")
    jobs.start(job, 1)
    got: list[LogChunk] = []
    async for chunk in reader.read(job, follow=True, tail_lines=1):
        got.append(chunk)
        match chunk.text:
            case "step 1\n":
                ray.logs[first] += "step 2\n"
            case "step 2\n":
                jobs.request_pause(job)
                jobs.stop(job, attempt=1)
                jobs.resume(job)
                second = submission_id(job, 2)
                ray.jobs[second], ray.logs[second] = {"status": "RUNNING"}, "step 3\n"
            case "step 3\n":
                ray.logs[second] += "done\n"
                ray.jobs[second] = {"status": "SUCCEEDED"}
                jobs.finish(job, JobState.FAILED, reason="X", message="x")
    assert got == [(1, "step 1\n"), (1, "step 2\n"), (2, "step 3\n"), (2, "done\n")]


async def test_following_waits_for_what_is_printed_last(
    reader: JobLogs, jobs: JobStore, ray: FakeRay, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = attempt(jobs, ray, job, 1, "first\n")
    jobs.finish(job, JobState.FAILED, reason="X", message="x")
    get = RayJobs.get

    def leave(self: RayJobs, submission: str) -> object:
        """Answer that it runs, after which it prints its last line and goes."""
        known = get(self, submission)
        ray.jobs[name]["status"] = "FAILED"
        ray.logs[name] = "first\nlast\n"
        return known

    monkeypatch.setattr(RayJobs, "get", leave)
    got = await everything(reader.read(job, follow=True, tail_lines=0))
    assert got == [(1, "first\n"), (1, "last\n")]
