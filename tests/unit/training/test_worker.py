"""What a training's workers are given."""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from sqlalchemy import select

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.errors import ComputeUnavailableError, InvalidArgumentError
from toile.core.jobs import JobState
from toile.core.jobs.leaving import LEAVE_SECONDS
from toile.core.jobs.rayjob import GRACE_SECONDS, STOP_SECONDS
from toile.core.jobs.runtime import JobContext
from toile.core.settings import Settings
from toile.training import run, worker
from toile.training.worker import scaling


@pytest.mark.parametrize(
    ("wants", "gpus", "takes"),
    [
        (None, 0, False),
        (None, 1, False),
        (None, 2, True),
        (None, 8, True),
        (True, 0, True),
        (False, 8, False),
    ],
)
def test_workers_take_gpus_where_there_is_one_for_each(
    wants: bool | None, gpus: float, takes: bool
) -> None:
    config = scaling(2, wants, gpus)
    assert (config.num_workers, config.use_gpu) == (2, takes)


def test_a_checkpoint_can_be_kept_before_pods_are_killed() -> None:
    assert LEAVE_SECONDS < STOP_SECONDS < GRACE_SECONDS


@pytest.mark.parametrize(
    ("workers", "gpus", "message"),
    [(1, True, "waiting for 1 GPU of"), (2, False, "waiting for 2 processors of")],
)
def test_what_the_cluster_has_to_free_is_told_before_workers_start(
    train: Callable[..., JobRow],
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    gpus: bool,
    message: str,
) -> None:
    told: list[dict[str, object]] = []

    class Blocked:
        """Ray Train, where there is no room yet."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def fit(self) -> None:
            with catalog.reading() as session:
                told.extend(job.progress for job in session.scalars(select(JobRow)))

    monkeypatch.setattr(worker, "TorchTrainer", Blocked)
    train(functools.partial(worker._fit, workers=scaling(workers, gpus, 0)))
    assert told[0]["phase"] == "wait"
    assert str(told[0]["message"]).startswith(message)


BROKEN = RuntimeError("Connection closed by peer")  # as gloo says it
UNFORESEEN = ValueError("a mistake of ours")
REFUSED = InvalidArgumentError("nothing to train on")


class HealthCheckFailedError(Exception):
    """As Ray Train tells of a worker that died."""

    health_check_failure = RayActorError()


def be_a_worker(
    job: JobContext, monkeypatch: pytest.MonkeyPatch, error: Exception | None, world_size: int
) -> list[str]:
    """Be the leading one of some workers; tells of what it trained."""
    trained: list[str] = []

    def train_and_publish(job: JobContext, **_: object) -> None:
        trained.append(job.name)
        if error is not None:
            raise error

    context = SimpleNamespace(
        get_world_rank=lambda: 0,
        get_world_size=lambda: world_size,
        get_local_world_size=lambda: world_size,
    )
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_and_publish", train_and_publish)
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        patch.setattr(worker.os, "nice", lambda _: 0)
        config = {"settings": job.settings, "job": job.name, "attempt": job.attempt}
        worker.work(config)
    return trained


@pytest.mark.parametrize(
    ("error", "world_size", "recorded", "raised"),
    [
        (BROKEN, 1, True, False),
        (BROKEN, 2, False, True),
        (UNFORESEEN, 2, False, True),
        (REFUSED, 1, True, False),
        (REFUSED, 2, True, True),
        (torch.OutOfMemoryError("no memory"), 2, True, True),
        (RayActorError(), 1, False, True),
    ],
)
def test_what_may_come_of_another_workers_death_is_not_recorded(
    train: Callable[..., JobRow],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    world_size: int,
    recorded: bool,
    raised: bool,
) -> None:
    ended: list[bool] = []

    def work(job: JobContext) -> None:
        if raised:
            with pytest.raises(type(error)):
                be_a_worker(job, monkeypatch, error, world_size)
        else:
            be_a_worker(job, monkeypatch, error, world_size)
        ended.append(not job.current())

    train(work)
    assert ended == [recorded]


def test_workers_that_are_started_again_for_a_failed_job_leave_at_once(
    train: Callable[..., JobRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(job: JobContext) -> None:
        with pytest.raises(InvalidArgumentError):
            be_a_worker(job, monkeypatch, REFUSED, 2)
        assert be_a_worker(job, monkeypatch, None, 2) == []

    job = train(work)
    assert (job.state, job.error_message) == (JobState.FAILED, "nothing to train on")


@pytest.mark.parametrize("death", [RayActorError(), HealthCheckFailedError()])
def test_deaths_are_told_apart_from_what_they_broke(death: Exception) -> None:
    failure = worker._failure(WorkerGroupError("two of two", {0: BROKEN, 1: death}))
    assert isinstance(failure, ComputeUnavailableError)
    assert failure.reason == "COMPUTE_LOST"


def test_what_workers_raise_again_and_again_is_the_failure() -> None:
    assert worker._failure(WorkerGroupError("one of two", {1: UNFORESEEN})) is UNFORESEEN


@pytest.mark.parametrize(("threads", "workers", "each"), [(6, 1, 6), (6, 4, 1), (1, 2, 1)])
def test_workers_share_the_threads_that_the_settings_allow(
    threads: int, workers: int, each: int
) -> None:
    before = torch.get_num_threads()
    try:
        worker._share_threads(Settings(cpu_threads=threads), workers)
        assert torch.get_num_threads() == each
        worker._share_threads(Settings(), 1)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)
