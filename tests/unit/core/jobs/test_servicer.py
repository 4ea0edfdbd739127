"""JobService over a real connection."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from toile.core.catalog.engine import Catalog
from toile.core.jobs import JobKind, JobState, JobStore
from toile.core.jobs.progress import progress_dict
from toile.core.jobs.servicer import JOB_SERVICE_NAME, add_job_service
from toile.core.jobs.supervisor import submission_id
from toile.core.rpc.server import Service, start
from toile.core.settings import Settings
from toile.v1 import job_pb2, job_pb2_grpc
from unit.core.jobs.fake_ray import FakeRay


@pytest.fixture
async def stub(
    catalog: Catalog, settings: Settings, ray: FakeRay
) -> AsyncIterator[job_pb2_grpc.JobServiceStub]:
    settings = settings.model_copy(update={"ray_jobs_url": ray.url})
    service = Service("jobs", [add_job_service(settings, catalog)], [JOB_SERVICE_NAME], {})
    running = await start(service, settings.model_copy(update={"grace_seconds": 0.1}))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        yield job_pb2_grpc.JobServiceStub(channel)
    await running.stop()


async def test_watch_follows_to_the_end(
    stub: job_pb2_grpc.JobServiceStub, catalog: Catalog, jobs: JobStore, job: str
) -> None:
    jobs.next_attempt(job, after=0)
    jobs.start(job, 1)
    responses = aiter(stub.WatchJob(job_pb2.WatchJobRequest(name=job)))
    first = await anext(responses)
    assert first.event.state == job_pb2.JOB_STATE_QUEUED
    assert not first.HasField("job")
    jobs.report(job, 1, progress_dict("train", 3, 9, loss=0.25, message="on"))
    with catalog.transaction() as session:
        jobs.succeed(session, job, 1)
    rest = [response async for response in responses]
    assert [response.event.sequence for response in rest] == [2, 3, 4]
    assert rest[1].event.progress.loss == 0.25
    assert not rest[1].event.progress.HasField("learning_rate")
    assert rest[2].job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_watch_goes_on_where_the_client_was(
    stub: job_pb2_grpc.JobServiceStub, jobs: JobStore, job: str
) -> None:
    jobs.request_cancel(job)
    seen_one = stub.WatchJob(job_pb2.WatchJobRequest(name=job, after_sequence=1))
    assert [response.event.sequence async for response in seen_one] == [2]
    seen_all = stub.WatchJob(job_pb2.WatchJobRequest(name=job, after_sequence=2))
    (last,) = [response async for response in seen_all]
    assert last.job.state == job_pb2.JOB_STATE_CANCELLED


async def test_errors_are_typed(stub: job_pb2_grpc.JobServiceStub) -> None:
    for name, code in [
        ("projects/p/jobs/none", grpc.StatusCode.NOT_FOUND),
        ("jobs/none", grpc.StatusCode.INVALID_ARGUMENT),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetJob(job_pb2.GetJobRequest(name=name))
        assert caught.value.code() == code


async def test_failed_job_says_why(
    stub: job_pb2_grpc.JobServiceStub, jobs: JobStore, job: str
) -> None:
    jobs.finish(job, JobState.FAILED, reason="DISK_FULL", message="no space is left")
    answer = (await stub.GetJob(job_pb2.GetJobRequest(name=job))).job
    assert answer.kind == job_pb2.JOB_KIND_TRAINING
    assert (answer.error.reason, answer.error.message) == ("DISK_FULL", "no space is left")


async def test_list_is_newest_first_and_pages(
    stub: job_pb2_grpc.JobServiceStub, catalog: Catalog, jobs: JobStore, job: str
) -> None:
    with catalog.transaction() as session:
        second = jobs.create(
            session, project="p", kind=JobKind.DATASET_BUILD, target="t", spec={}
        ).name
        jobs.create(session, project="other", kind=JobKind.TRAINING, target="t", spec={})
    request = job_pb2.ListJobsRequest(parent="projects/p", page_size=1)
    first = await stub.ListJobs(request)
    request.page_token = first.next_page_token
    last = await stub.ListJobs(request)
    assert [one.name for one in (*first.jobs, *last.jobs)] == [second, job]
    assert not last.next_page_token


async def test_cancel(stub: job_pb2_grpc.JobServiceStub, job: str) -> None:
    for _ in range(2):
        answer = await stub.CancelJob(job_pb2.CancelJobRequest(name=job))
        assert answer.job.state == job_pb2.JOB_STATE_CANCELLED


async def test_watch_of_a_paused_job_goes_on_when_it_is_resumed(
    stub: job_pb2_grpc.JobServiceStub, jobs: JobStore, job: str
) -> None:
    paused = await stub.PauseJob(job_pb2.PauseJobRequest(name=job))
    assert paused.job.state == job_pb2.JOB_STATE_PAUSED
    responses = aiter(stub.WatchJob(job_pb2.WatchJobRequest(name=job)))
    states = [(await anext(responses)).event.state for _ in range(2)]
    assert states == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_PAUSED]
    resumed = await stub.ResumeJob(job_pb2.ResumeJobRequest(name=job))
    assert resumed.job.state == job_pb2.JOB_STATE_QUEUED
    await stub.CancelJob(job_pb2.CancelJobRequest(name=job))
    rest = [response async for response in responses]
    assert [response.event.sequence for response in rest] == [3, 4]
    assert rest[1].job.state == job_pb2.JOB_STATE_CANCELLED


async def test_refusals_of_pause_and_resume_are_typed(
    stub: job_pb2_grpc.JobServiceStub, jobs: JobStore, job: str
) -> None:
    jobs.finish(job, JobState.FAILED, reason="DISK_FULL", message="full")
    for call in (
        stub.PauseJob(job_pb2.PauseJobRequest(name=job)),
        stub.ResumeJob(job_pb2.ResumeJobRequest(name=job)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_queued_jobs_know_their_place_among_their_kind(
    stub: job_pb2_grpc.JobServiceStub, catalog: Catalog, jobs: JobStore, job: str
) -> None:
    def add(project: str, kind: JobKind) -> str:
        with catalog.transaction() as session:
            return jobs.create(session, project=project, kind=kind, target="t", spec={}).name

    foreign = add("other", JobKind.TRAINING)
    build = add("p", JobKind.DATASET_BUILD)
    last = add("p", JobKind.TRAINING)

    async def places() -> dict[str, int | None]:
        answer = await stub.ListJobs(job_pb2.ListJobsRequest(parent="projects/p"))
        listed = {
            one.name: one.queue_position if one.HasField("queue_position") else None
            for one in answer.jobs
        }
        for name, place in listed.items():
            got = (await stub.GetJob(job_pb2.GetJobRequest(name=name))).job
            assert (got.queue_position if got.HasField("queue_position") else None) == place
        return listed

    assert await places() == {job: 1, build: 1, last: 3}
    jobs.next_attempt(foreign, after=0)
    jobs.start(foreign, 1)
    jobs.request_pause(job)
    assert await places() == {job: None, build: 1, last: 1}
    resumed = await stub.ResumeJob(job_pb2.ResumeJobRequest(name=job))
    assert resumed.job.queue_position == 1, "the supervisor takes the oldest first"
    assert await places() == {job: 1, build: 1, last: 2}


async def test_logs_come_in_pieces_with_their_attempt(
    stub: job_pb2_grpc.JobServiceStub, ray: FakeRay, jobs: JobStore, job: str
) -> None:
    jobs.next_attempt(job, after=0)
    printed = "a line of a job that prints much\n" * 5000
    ray.jobs[submission_id(job, 1)] = {}
    ray.logs[submission_id(job, 1)] = printed
    answers = [one async for one in stub.GetJobLogs(job_pb2.GetJobLogsRequest(name=job))]
    assert len(answers) > 1
    assert {one.attempt for one in answers} == {1}
    assert "".join(one.text for one in answers) == printed


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"tail_lines": -1}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"name": "projects/p/jobs/none"}, grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_logs_that_cannot_be_asked_for(
    stub: job_pb2_grpc.JobServiceStub, job: str, fields: dict[str, Any], code: grpc.StatusCode
) -> None:
    request = job_pb2.GetJobLogsRequest(**{"name": job, **fields})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(stub.GetJobLogs(request)))
    assert caught.value.code() == code
