"""The one module that speaks to Ray Train: starts workers, and what each of them does.

`launch` runs in the job's process and imports no torch beyond what Ray Train does; `work` runs in
a worker. Several workers find their caches computed (`stage`); one computes them for itself. The
worker that leads (rank 0) publishes the model version and ends the job by itself, so that no
result has to travel back.

A worker that is killed is started again by Ray Train, and with it all that train together; they go
on from the last checkpoint. An error of the training itself is recorded as the job's failure and
not tried again. Where several train together, one that dies also breaks the others' collectives:
whatever nobody foresaw is taken for that first, and is recorded if it comes again and again.
"""

import contextlib
import os
import shutil
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from toile.core import logging as core_logging
from toile.core.errors import CancelledError, ComputeUnavailableError, ToileError
from toile.core.jobs.failures import COMPUTE_LOST, is_compute_lost, is_foreseen
from toile.core.jobs.leaving import leave
from toile.core.jobs.runtime import JobContext, install_stop_handler, opened
from toile.core.settings import Settings
from toile.training.patience import report
from toile.training.stage import NICENESS, fill_caches

WORKER_RESTARTS = 3
_COLLECTIVE_TIMEOUT_SECONDS = 300
# Ray Train has no other place for these.
_RAY_TRAIN_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon it notices that the worker is done
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine imports torch for a minute
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; attempts are the answer
}


def launch(job: JobContext) -> None:
    """Train and publish what the job asks for, on Ray Train workers; returns when it has ended.

    Raises:
        ComputeUnavailableError: Workers died too often (`COMPUTE_LOST`).
    """
    os.environ.update(_RAY_TRAIN_VARIABLES)
    ray.init(address="auto")
    install_stop_handler()
    workers = scaling(
        int(job.spec["workers"]), job.settings.train_gpu, ray.cluster_resources().get("GPU", 0)
    )
    try:
        if workers.num_workers > 1:
            _say_waiting(job, workers)
            fill_caches(job, actors=workers.num_workers, gpus=int(workers.use_gpu))
        _fit(job, workers)
    finally:
        shutil.rmtree(job.scratch_path, ignore_errors=True)


def _say_waiting(job: JobContext, workers: ScalingConfig) -> None:
    """Tell that the cluster may have to get free; the workers tell what follows."""
    count, what = workers.num_workers, "GPU" if workers.use_gpu else "processor"
    needed = f"{count} {what}{'' if count == 1 else 's'}"
    report(job, "wait", 0, 1, message=f"waiting for {needed} of the cluster")


def _fit(job: JobContext, workers: ScalingConfig) -> None:
    _say_waiting(job, workers)
    trainer = TorchTrainer(
        work,
        train_loop_config={"settings": job.settings, "job": job.name, "attempt": job.attempt},
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=workers,
        run_config=RunConfig(
            name=f"attempt-{job.attempt}",
            storage_path=str(job.scratch_path / "ray"),
            failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
        ),
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        with contextlib.suppress(ToileError):  # without the catalog workers learn of nothing
            leave(job.jobs, job.name, job.attempt)
        raise
    except WorkerGroupError as error:
        raise _failure(error) from error


def _failure(error: WorkerGroupError) -> Exception:
    """What ended the training: that workers died, or else what one of them raised."""
    # Ray Train wraps a death that it noticed while it asked the worker how it is.
    causes: list[Exception] = [
        getattr(failure, "health_check_failure", failure)
        for failure in error.worker_failures.values()
    ]
    if any(isinstance(cause, ray.exceptions.RayActorError) for cause in causes):
        return ComputeUnavailableError(
            f"training workers died {WORKER_RESTARTS + 1} times", reason=COMPUTE_LOST
        )
    return causes[0]


def scaling(workers: int, wants_gpus: bool | None, gpus: float) -> ScalingConfig:
    """Return what workers are given.

    Args:
        workers: How many train together.
        wants_gpus: Whether each takes a GPU; None: if there is one for each.
        gpus: Of the cluster, whether they are free now or not.
    """
    takes_gpus = gpus >= workers if wants_gpus is None else wants_gpus
    return ScalingConfig(num_workers=workers, use_gpu=takes_gpus)


def work(config: dict[str, Any]) -> None:
    """Be one worker."""
    # Late: the job's own process loads this module too, and needs none of the networks' code.
    from toile.training.run import train_and_publish

    context = ray.train.get_context()
    core_logging.configure(config["settings"], "training")
    _share_threads(config["settings"], context.get_local_world_size())
    os.nice(NICENESS)
    device = ray.train.torch.get_device()
    gpus = int(device.type == "cuda")
    with opened(config["settings"], config["job"], config["attempt"]) as job, job.heartbeat(gpus):
        if not job.current():
            return  # an error of the training itself ended it, and Ray Train started all again
        try:
            train_and_publish(
                job, rank=context.get_world_rank(), device=device, meet=ray.train.collective.barrier
            )
        except CancelledError as error:
            job.fail(error)
        except Exception as error:
            if is_compute_lost(error):
                raise
            alone = context.get_world_size() == 1
            if alone or is_foreseen(error):
                job.fail(error)
            if not alone:
                raise  # the other ranks wait for this one


def _share_threads(settings: Settings, workers_here: int) -> None:
    """Share the threads among this machine's workers; Ray gives torch one a logical CPU."""
    import torch

    torch.set_num_threads(max(1, settings.resolved_cpu_threads // workers_here))
