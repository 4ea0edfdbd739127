"""What trainings draw while they run: kept, listed, asked for, and sent."""

from collections.abc import AsyncIterator

import grpc.aio
import pytest

from toile.core.artifacts import ArtifactStore, open_store
from toile.core.catalog.engine import Catalog
from toile.core.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from toile.core.jobs import JobKind, JobState, JobStore
from toile.core.jobs.progress import progress_dict
from toile.core.jobs.runtime import JobContext
from toile.core.jobs.samples import JobSamples, Sample, SampleSet
from toile.core.jobs.servicer import JOB_SERVICE_NAME, add_job_service
from toile.core.rpc.server import Service, start
from toile.core.settings import Settings
from toile.v1 import job_pb2, job_pb2_grpc

JUDGED = SampleSet(
    100,
    [Sample("a dress", 7, {"style": 0.5, "colour": None}), Sample("a skirt", 8, {"style": 0.7})],
)
PNGS = [b"first", b"second"]


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings)


@pytest.fixture
def samples(store: ArtifactStore, job: str) -> JobSamples:
    return JobSamples(store, job)


@pytest.fixture
async def stub(catalog: Catalog, settings: Settings) -> AsyncIterator[job_pb2_grpc.JobServiceStub]:
    service = Service("jobs", [add_job_service(settings, catalog)], [JOB_SERVICE_NAME], {})
    running = await start(service, settings.model_copy(update={"grace_seconds": 0.1}))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        yield job_pb2_grpc.JobServiceStub(channel)
    await running.stop()


def started(jobs: JobStore, job: str) -> None:
    assert jobs.next_attempt(job, after=0)
    jobs.start(job, 1)


def test_a_set_comes_back_as_it_was_kept(samples: JobSamples) -> None:
    for step in (1000, 100):
        samples.keep(SampleSet(step, JUDGED.samples), PNGS)
    kept = samples.all()
    assert [one.drawn.step for one in kept] == [100, 1000]
    assert kept[0].drawn == JUDGED
    assert kept[0].drawn.mean_scores == {"style": pytest.approx(0.6)}
    assert [file.size_bytes for file in kept[0].files] == [5, 6]
    assert b"".join(samples.read(100, 1)) == b"second"


def test_a_set_is_kept_once(samples: JobSamples) -> None:
    samples.keep(JUDGED, PNGS)
    samples.keep(JUDGED, PNGS)
    with pytest.raises(AlreadyExistsError):
        samples.keep(JUDGED, [b"other", b"second"])
    assert b"".join(samples.read(100, 0)) == b"first"


def test_a_version_has_them_under_their_steps(samples: JobSamples) -> None:
    samples.keep(JUDGED, PNGS)
    paths = [path for path, _ in samples.files()]
    assert paths == [f"samples/step-000100/{name}" for name in ("00.png", "01.png", "samples.json")]


def test_half_a_set_is_none(samples: JobSamples, store: ArtifactStore, job: str) -> None:
    samples.keep(JUDGED, PNGS)
    store.delete(f"{job}/samples/step-000100/manifest.json")
    assert samples.all() == []
    with pytest.raises(NotFoundError):
        samples.get(100)


def test_samples_that_are_told_of_are_what_was_asked_for(jobs: JobStore, job: str) -> None:
    started(jobs, job)
    jobs.report(job, 1, progress_dict("train", 5, 9, samples_step=5))
    row, asked_at = jobs.request_samples(job)
    assert (row.samples_requested, row.state) == (True, JobState.RUNNING)
    jobs.report(job, 1, progress_dict("train", 6, 9))
    assert jobs.heartbeat(job, 1) == (False, True)
    jobs.report(job, 1, progress_dict("train", 6, 9, samples_step=6))
    assert jobs.heartbeat(job, 1) == (False, False)
    events, _ = jobs.events_after(job, asked_at)
    assert [e.progress.get("samples_step") for e in events if e.progress] == [None, 6]
    before, _ = jobs.events_after(job, asked_at - 1)
    assert before[0].progress is not None
    assert "samples_step" not in before[0].progress


def test_a_request_survives_a_pause_and_ends_with_the_job(
    catalog: Catalog, jobs: JobStore, job: str
) -> None:
    started(jobs, job)
    jobs.request_samples(job)
    jobs.request_pause(job)
    jobs.stop(job, attempt=1)
    jobs.resume(job)
    jobs.start(job, 2)
    assert jobs.heartbeat(job, 2).for_samples
    with catalog.transaction() as session:
        jobs.succeed(session, job, 2)
    assert not jobs.get(job).samples_requested


def test_who_has_no_samples(catalog: Catalog, jobs: JobStore, job: str) -> None:
    with catalog.transaction() as session:
        build = jobs.create(
            session, project="p", kind=JobKind.DATASET_BUILD, target="t", spec={}
        ).name
    for name, reason in [(build, "JOB_HAS_NO_SAMPLES"), (job, "JOB_NOT_RUNNING")]:
        with pytest.raises(FailedPreconditionError) as caught:
            jobs.request_samples(name)
        assert caught.value.reason == reason
    started(jobs, job)
    jobs.request_cancel(job)
    with pytest.raises(FailedPreconditionError):
        jobs.request_samples(job)


def test_a_process_asks_the_catalog_whether_a_request_is_open(
    settings: Settings, catalog: Catalog, store: ArtifactStore, jobs: JobStore, job: str
) -> None:
    started(jobs, job)
    context = JobContext(settings, catalog, store, job, 1)
    assert not context.samples_asked()
    jobs.request_samples(job)
    assert context.samples_asked()
    assert context.samples_wanted()
    context.report("train", 1, 9, samples_step=1)
    assert not context.samples_wanted()
    assert not context.samples_asked()


async def test_samples_are_asked_for_listed_and_sent(
    stub: job_pb2_grpc.JobServiceStub, jobs: JobStore, samples: JobSamples, job: str
) -> None:
    started(jobs, job)
    asked = await stub.RequestJobSamples(job_pb2.RequestJobSamplesRequest(name=job))
    assert asked.job.progress.message == "samples were asked for"
    samples.keep(JUDGED, PNGS)
    scores = {"style": 0.6}
    jobs.report(
        job,
        1,
        progress_dict("train", 3, 9, samples_step=3, sample_scores=scores, best_samples_step=2),
    )
    watch = job_pb2.WatchJobRequest(name=job, after_sequence=asked.after_sequence)
    told = (await anext(aiter(stub.WatchJob(watch)))).event.progress
    assert (told.samples_step, dict(told.sample_scores), told.best_samples_step) == (3, scores, 2)
    (drawn,) = (await stub.ListJobSamples(job_pb2.ListJobSamplesRequest(name=job))).samples
    assert drawn.step == 100
    assert [(one.prompt, one.seed) for one in drawn.samples] == [("a dress", 7), ("a skirt", 8)]
    assert dict(drawn.samples[0].scores) == {"style": 0.5}
    request = job_pb2.DownloadJobSampleRequest(name=job, step=100, index=1)
    assert b"".join([one.chunk async for one in stub.DownloadJobSample(request)]) == b"second"


async def test_samples_that_are_not_there(
    stub: job_pb2_grpc.JobServiceStub, samples: JobSamples, job: str
) -> None:
    samples.keep(JUDGED, PNGS)
    for fields in ({"step": 100, "index": 2}, {"step": 5}, {"name": f"{job}x", "step": 100}):
        request = job_pb2.DownloadJobSampleRequest(**{"name": job, **fields})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.DownloadJobSample(request)))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RequestJobSamples(job_pb2.RequestJobSamplesRequest(name=job))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
