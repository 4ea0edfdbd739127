"""Trainings over gRPC on a real Ray head, and what they survive."""

import asyncio
import io
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
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

LONG = {"steps": 48, "checkpoint_interval_steps": 5}
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


async def assert_as_if_uninterrupted(platform: Platform, version: str) -> None:
    """Compare a version of `LONG` with that of a run that nothing happened to, bit for bit.

    That run is made by whoever asks first: its request id finds it again.
    """
    job = await create(platform, request_of("whole", request_id="whole", **LONG))
    assert (await platform.watch(job.name))[-1].job.state == job_pb2.JOB_STATE_SUCCEEDED
    losses = [await download(platform, name, "loss.jsonl") for name in (version, job.target)]
    assert losses[0] == losses[1]
    one, two = [
        safetensors.torch.load(await download(platform, name, "pytorch_lora_weights.safetensors"))
        for name in (version, job.target)
    ]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


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
    await platform.wait_for_step(job.name, 1)
    await platform.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
    assert (await platform.watch(job.name))[-1].job.state == job_pb2.JOB_STATE_CANCELLED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await platform.train.GetModelVersion(train_pb2.GetModelVersionRequest(name=job.target))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_paused_training_ends_with_the_weights_of_an_unpaused_one(
    platform: Platform, ray_head: RayHead
) -> None:
    job = await create(platform, request_of("paused", **LONG))
    await platform.wait_for_step(job.name, 8)
    await platform.jobs.PauseJob(job_pb2.PauseJobRequest(name=job.name))
    watch = platform.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name))
    seen: list[job_pb2.JobEvent] = []
    async for response in watch:
        seen.append(response.event)
        if response.event.state == job_pb2.JOB_STATE_PAUSED:
            break
    watch.cancel()
    for process in ray_head.processes("toile.training"):
        await asyncio.to_thread(process.wait, 60)  # it gives its compute back
    await platform.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=job.name))
    rest = await platform.watch(job.name, after=seen[-1].sequence)
    end = rest[-1].job
    assert (end.state, end.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 2), end.error
    before = [event.progress.step for event in seen if event.progress.phase == "train"]
    after = [r.event.progress.step for r in rest if r.event.progress.phase == "train"]
    assert after[0] > before[-1], "no step is done again"
    logs = platform.jobs.GetJobLogs(job_pb2.GetJobLogsRequest(name=job.name))
    assert {chunk.attempt async for chunk in logs} == {1, 2}
    await assert_as_if_uninterrupted(platform, job.target)


async def test_mistakes_are_answered_before_anything_is_queued(platform: Platform) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(platform, request_of("bad", rank=1000))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "lora.rank" in str(caught.value.details())


async def test_terminated_training_keeps_where_it_was(
    platform: Platform, ray_head: RayHead
) -> None:
    job = await create(platform, request_of("terminated", **LONG))
    await platform.wait_for_step(job.name, 8)
    (process,) = ray_head.processes("toile.training")
    process.terminate()
    await asyncio.to_thread(process.wait, 60)
    row = JobStore(platform.catalog).get(job.name)
    assert (row.attempt, row.state) != (1, JobState.RUNNING), "it waited for its workers"
    responses = await platform.watch(job.name)
    end = responses[-1].job
    assert (end.state, end.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 2), end.error
    events = [response.event for response in responses]
    follows = next(
        place
        for place, event in enumerate(events)
        if event.state == job_pb2.JOB_STATE_QUEUED and place
    )
    told = [
        [e.progress.step for e in part if e.progress.phase == "train"]
        for part in (events[:follows], events[follows:])
    ]
    assert told[1][0] > told[0][-1], "no step is done again"
    await assert_as_if_uninterrupted(platform, job.target)


@pytest.mark.parametrize(("victim", "attempts"), [("toile.training", 2), ("RayTrainWorker", 1)])
async def test_killed_process_is_replaced(
    platform: Platform, ray_head: RayHead, victim: str, attempts: int
) -> None:
    job = await create(platform, request_of(f"killed-{attempts}", **LONG))
    await platform.wait_for_step(job.name, 8)
    killed = ray_head.processes(victim)
    assert killed
    for process in killed:
        process.kill()
    responses = await platform.watch(job.name)
    end = responses[-1].job
    assert (end.state, end.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, attempts), end.error
    progress = [response.event.progress for response in responses]
    starts = [place for place, one in enumerate(progress) if one.phase == "prepare"]
    assert len(starts) == 2
    again = next(one for one in progress[starts[1] :] if one.phase == "train")
    assert again.step > 5, "it goes on from a checkpoint"
    await assert_as_if_uninterrupted(platform, job.target)


async def test_killed_ray_head_costs_an_attempt_and_no_more(home: Path, own_head: RayHead) -> None:
    async with running(settings_for(home, own_head.jobs_url)) as platform:
        job = await create(platform, request_of("head", **LONG))
        await platform.wait_for_step(job.name, 8)
        own_head.kill()
        await asyncio.to_thread(own_head.start)
        end = (await platform.watch(job.name))[-1].job
        assert (end.state, end.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 2), end.error
        await assert_as_if_uninterrupted(platform, job.target)
