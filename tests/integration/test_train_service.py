"""Trainings over gRPC on a real Ray head, and what they survive."""

import asyncio
import io
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import grpc.aio
import psutil
import pytest
import safetensors.torch
import torch
from PIL import Image

from integration.ray_head import RayHead
from integration.training_platform import (
    Platform,
    control_request_of,
    prepare,
    request_of,
    running,
    settings_for,
)
from toile.core.jobs import JobState, JobStore
from toile.diffusion.bundle import Bundle
from toile.training.caches import encoded
from toile.training.data import read_examples
from toile.v1 import job_pb2, train_pb2

pytestmark = pytest.mark.timeout(1800)  # most of it on a machine that is busy otherwise

WEIGHTS = "pytorch_lora_weights.safetensors"
CHECKPOINT_INTERVAL = 5
LONG = {"steps": 120, "checkpoint_interval_steps": CHECKPOINT_INTERVAL}
"""Enough steps to interfere with."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    home = tmp_path_factory.mktemp("train")
    prepare(settings_for(home, ""), tiny_bundle)
    return home


@pytest.fixture
async def platform(home: Path, ray_head: RayHead) -> AsyncIterator[Platform]:
    async with running(settings_for(home, ray_head.jobs_url)) as platform:
        yield platform


@pytest.fixture
def own_head() -> Iterator[RayHead]:
    """A Ray head to be killed."""
    head = RayHead()
    try:
        head.start()
        yield head
    finally:
        head.stop()


async def create(platform: Platform, request: train_pb2.CreateTrainingJobRequest) -> job_pb2.Job:
    return (await platform.train.CreateTrainingJob(request)).job


async def download(platform: Platform, version: str, path: str) -> bytes:
    request = train_pb2.DownloadModelFileRequest(name=version, path=path)
    return b"".join([piece.chunk async for piece in platform.train.DownloadModelFile(request)])


async def test_training_becomes_a_model_version(platform: Platform) -> None:
    request = request_of("lace", request_id="once", sample_prompts=["a lace dress"])
    job = await create(platform, request)
    assert (await create(platform, request)).name == job.name
    responses = await platform.watch(job.name)
    end = responses[-1].job
    assert (end.state, end.error.message) == (job_pb2.JOB_STATE_SUCCEEDED, "")
    assert [response.event.sequence for response in responses] == list(range(1, len(responses) + 1))
    phases = dict.fromkeys(response.event.progress.phase for response in responses)
    assert list(filter(None, phases)) == [
        "wait",
        "prepare",
        "cache",
        "train",
        "sample",
        "verify",
        "publish",
    ]
    steps = [r.event.progress for r in responses if r.event.progress.phase == "train"]
    assert steps[-1].step == steps[-1].total_steps == 12
    assert all(progress.HasField("loss") for progress in steps)

    version = (
        await platform.train.GetModelVersion(train_pb2.GetModelVersionRequest(name=job.target))
    ).version
    assert version.dataset_version == "projects/p/datasets/lace/versions/1"
    assert version.reproduction_difference <= 2
    sample = await download(platform, version.name, "samples/00.png")
    assert Image.open(io.BytesIO(sample)).size == (128, 128)
    losses = (await download(platform, version.name, "loss.jsonl")).splitlines()
    assert len(losses) == 12
    models = (
        await platform.train.ListModels(train_pb2.ListModelsRequest(parent="projects/p"))
    ).models
    assert [model.latest_version for model in models if model.name.endswith("/lace")] == [
        job.target
    ]


async def test_a_controlnet_becomes_a_model_version(platform: Platform) -> None:
    request = control_request_of("lines", validation_share=0.25, validation_interval_steps=6)
    job = await create(platform, request)
    end = (await platform.watch(job.name))[-1].job
    assert (end.state, end.error.message) == (job_pb2.JOB_STATE_SUCCEEDED, "")
    version = (
        await platform.train.GetModelVersion(train_pb2.GetModelVersionRequest(name=job.target))
    ).version
    assert version.adapter_type == "controlnet"
    assert version.controlnet_config.control_kind == "edges"
    assert version.reproduction_difference <= 2
    facts = json.loads(await download(platform, version.name, "alignment.json"))
    assert len(facts["samples"]) == len(version.controlnet_config.sample_prompts) == 2
    shown = await download(platform, version.name, "samples/01.map.png")
    assert Image.open(io.BytesIO(shown)).size == (128, 128)


@pytest.mark.slow
async def test_two_workers_find_the_caches_that_one_would_compute(
    home: Path, ray_head: RayHead, tiny_bundle: Path
) -> None:
    settings = settings_for(home, ray_head.jobs_url).model_copy(update={"train_workers": 2})
    async with running(settings) as platform:
        for info in list(platform.store.list("projects/p/caches/")):
            platform.store.delete(info.key)
        job = await create(platform, request_of("two", steps=4, masked_loss=True))
        responses = await platform.watch(job.name)
        end = responses[-1].job
        assert (end.state, end.error.message) == (job_pb2.JOB_STATE_SUCCEEDED, "")
        told = [response.event.progress for response in responses if response.event.progress.phase]
        before = list(itertools.takewhile(lambda progress: progress.phase != "prepare", told))
        staged = [progress for progress in before if progress.phase == "cache"]
        assert [progress.step for progress in staged] == [0, 4, 8], "before the workers start"
        assert {progress.total_steps for progress in staged} == {8}
        (key,) = (
            info.key
            for info in platform.store.list("projects/p/caches/examples-")
            if info.key.endswith("safetensors")
        )
        found = safetensors.torch.load(platform.store.get(key))
    alone = encoded(Bundle.load(tiny_bundle), read_examples(home / "version"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in vars(alone).items())


async def test_cancelled_training_publishes_nothing(platform: Platform) -> None:
    job = await create(platform, request_of("cancelled", **LONG))
    await platform.wait_for(job.name, trains_after(starts=1))
    await platform.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
    assert (await platform.watch(job.name))[-1].job.state == job_pb2.JOB_STATE_CANCELLED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await platform.train.GetModelVersion(train_pb2.GetModelVersionRequest(name=job.target))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.slow
async def test_a_training_outlives_whatever_ends_it(home: Path, own_head: RayHead) -> None:
    """Its worker, its own process and Ray die, it, its pods and Ray are told to go, it is paused:
    the weights are those of a run that nothing happened to, bit for bit."""
    settings = settings_for(home, own_head.jobs_url)
    async with running(settings) as platform:
        job = await create(platform, request_of("whole", **LONG))
        whole = (await platform.watch(job.name))[-1].job
        assert whole.state == job_pb2.JOB_STATE_SUCCEEDED, whole.error

        job = await create(platform, request_of("interrupted", **LONG))
        await platform.wait_for(job.name, trains_after(starts=1))
        kill(own_head, "RayTrainWorker")
        told = await platform.wait_for(job.name, trains_after(starts=2))
        assert_goes_on_from_a_checkpoint(told)
        assert await attempt(platform, job) == 1, "Ray Train starts it again by itself"

        await end_process(own_head, psutil.Process.terminate)
        row = JobStore(platform.catalog).get(job.name)
        assert (row.attempt, row.state) != (1, JobState.RUNNING), "it waited for its workers"
        told = await platform.wait_for(job.name, trains_after(starts=3))
        assert await attempt(platform, job) == 2
        assert_no_step_was_repeated(told, job_pb2.JOB_STATE_QUEUED)

        await end_process(own_head, psutil.Process.kill)
        told = await platform.wait_for(job.name, trains_after(starts=4))
        assert_goes_on_from_a_checkpoint(told)
        assert await attempt(platform, job) == 3

        await platform.jobs.PauseJob(job_pb2.PauseJobRequest(name=job.name))
        await platform.wait_for(job.name, lambda event: event.state == job_pb2.JOB_STATE_PAUSED)
        for process in own_head.processes("toile.training"):
            await asyncio.to_thread(process.wait, 60)  # it gives its compute back
        await platform.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=job.name))
        told = await platform.wait_for(job.name, trains_after(starts=5))
        assert await attempt(platform, job) == 4
        assert_no_step_was_repeated(told, job_pb2.JOB_STATE_PAUSED)
        logs = platform.jobs.GetJobLogs(job_pb2.GetJobLogsRequest(name=job.name))
        assert {chunk.attempt async for chunk in logs} == {1, 2, 3, 4}

        # What each pod of a RayJob runs before it is ended.
        leaving = [sys.executable, "-P", "-m", "toile.core.jobs.leaving", job.name, "4"]
        pod = await asyncio.create_subprocess_exec(
            *leaving, env={**os.environ, **settings.environment()}
        )
        assert await asyncio.wait_for(pod.wait(), 60) == 0
        assert await attempt(platform, job) == 5
        told = await platform.wait_for(job.name, trains_after(starts=6))
        assert_no_step_was_repeated(told, job_pb2.JOB_STATE_QUEUED)

        own_head.kill()
        await asyncio.to_thread(own_head.start)
        told = await platform.wait_for(job.name, trains_after(starts=7))
        assert_goes_on_from_a_checkpoint(told)

        # It ends the actors first, and the job's process learns of that.
        await asyncio.to_thread(own_head.terminate)
        await asyncio.to_thread(own_head.start)
        told = await platform.wait_for(job.name, trains_after(starts=8))
        assert_goes_on_from_a_checkpoint(told)
        end = (await platform.watch(job.name))[-1].job
        assert (end.state, end.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 7), end.error
        await assert_same_training(platform, whole.target, end.target)


def trains_after(starts: int) -> Callable[[job_pb2.JobEvent], bool]:
    """Say whether a training has told of steps since its workers were started so often.

    By then it has kept a checkpoint, so that it need not begin anew.
    """
    started, trained = 0, 0

    def trains(event: job_pb2.JobEvent) -> bool:
        nonlocal started, trained
        if event.progress.phase == "prepare":
            started, trained = started + 1, 0
        trained += event.progress.phase == "train"
        return started == starts and trained >= 3 and event.progress.step > 2 * CHECKPOINT_INTERVAL

    return trains


def kill(head: RayHead, what: str) -> None:
    killed = head.processes(what)
    assert killed
    for process in killed:
        process.kill()


async def end_process(head: RayHead, end: Callable[[psutil.Process], None]) -> None:
    """End the process of the job that runs, and wait until it is gone."""
    (process,) = head.processes("toile.training")
    end(process)
    await asyncio.to_thread(process.wait, 60)


async def attempt(platform: Platform, job: job_pb2.Job) -> int:
    return (await platform.jobs.GetJob(job_pb2.GetJobRequest(name=job.name))).job.attempt


def steps(events: Iterable[job_pb2.JobEvent]) -> list[int]:
    return [event.progress.step for event in events if event.progress.phase == "train"]


def assert_goes_on_from_a_checkpoint(told: list[job_pb2.JobEvent]) -> None:
    """Weights alone do not show it: a training that begins anew ends with the same."""
    start = max(place for place, event in enumerate(told) if event.progress.phase == "prepare")
    assert steps(told[start:])[0] > CHECKPOINT_INTERVAL


def assert_no_step_was_repeated(told: list[job_pb2.JobEvent], state: int) -> None:
    """Compare the steps before and after the last time that a job was in a state.

    The event that tells of the state repeats the progress that was there by then.
    """
    place = max(place for place, event in enumerate(told) if event.state == state)
    assert steps(told[place + 1 :])[0] > steps(told[:place])[-1]


async def assert_same_training(platform: Platform, one: str, other: str) -> None:
    losses = [await download(platform, version, "loss.jsonl") for version in (one, other)]
    assert losses[0] == losses[1]
    weights = [
        safetensors.torch.load(await download(platform, version, WEIGHTS))
        for version in (one, other)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


async def test_mistakes_are_answered_before_anything_is_queued(platform: Platform) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(platform, request_of("bad", rank=1000))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "lora.rank" in str(caught.value.details())
