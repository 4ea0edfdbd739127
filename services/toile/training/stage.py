"""Computes a training's caches before its workers start: a stage of Ray Data of its own.

Each actor computes and keeps one shard after another, so that the workers find all of them, and
none waits in a collective for what another still computes.
"""

import contextlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data

from toile.core import logging as core_logging
from toile.core.artifacts import fetch
from toile.core.jobs.runtime import JobContext, opened
from toile.core.settings import Settings
from toile.training.cache_plans import PHASE, CachePlan, inputs, plans_for
from toile.training.patience import patiently, report

if TYPE_CHECKING:
    from toile.training.cache_maker import CacheMaker

NICENESS = 10
"""Of those who compute for a training: who draws on the same machine goes first."""


def fill_caches(job: JobContext, *, actors: int, gpus: int) -> None:
    """Compute the caches that a job's training needs and that there are not.

    Args:
        job: The job.
        actors: How many compute at once.
        gpus: That each of them takes, 0 or 1.

    Raises:
        CancelledError: The job should stop; shards that are done are kept.
        ToileError: What else went wrong in an actor.
    """
    plans = plans_for(job, *inputs(job))
    unpublished = [plan for plan in plans if not plan.is_published(job)]
    missing = {plan.kind: plan.missing(job) for plan in unpublished}
    rows = [{"kind": kind, "shard": shard} for kind, shards in missing.items() for shard in shards]
    if rows:
        _compute(job, plans, rows, actors=min(actors, len(rows)), gpus=gpus)
    for plan in unpublished:
        plan.publish(job)


def _compute(
    job: JobContext,
    plans: Sequence[CachePlan],
    rows: Sequence[dict[str, Any]],
    *,
    actors: int,
    gpus: int,
) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Wrapped as a `UserCodeException`, an error loses its type and reason between processes.
    context.raise_original_map_exception = True
    total = sum(plan.count for plan in plans)
    sizes = {(plan.kind, n): len(places) for plan in plans for n, places in enumerate(plan.shards)}
    done = total - sum(sizes[row["kind"], row["shard"]] for row in rows)
    report(job, PHASE, done, total)
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map_batches(
        MakeShard,
        fn_constructor_kwargs={
            "settings": job.settings,
            "name": job.name,
            "attempt": job.attempt,
            "gpus": gpus,
        },
        batch_size=1,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
    )
    for row in dataset.iter_rows():
        job.check()
        done += sizes[row["kind"], int(row["shard"])]
        report(job, PHASE, done, total)


class MakeShard:
    """An actor that computes shards on behalf of a job."""

    def __init__(self, settings: Settings, name: str, attempt: int, gpus: int) -> None:
        self._settings, self._name, self._attempt, self._gpus = settings, name, attempt, gpus
        self._opened = contextlib.ExitStack()  # for as long as the process lives

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Compute the shard that a batch of one row names."""
        (kind,), (shard,) = batch["kind"], batch["shard"]
        self._maker.make(self._plans[str(kind)], int(shard))
        return batch

    @cached_property
    def _job(self) -> JobContext:
        # With the first shard and not in the constructor: what Ray says of an actor that could
        # not be made has lost the error's type and reason.
        core_logging.configure(self._settings, "training")
        os.nice(NICENESS)
        job = self._opened.enter_context(opened(self._settings, self._name, self._attempt))
        self._opened.enter_context(job.heartbeat(self._gpus))
        return job

    @cached_property
    def _plans(self) -> dict[str, CachePlan]:
        return {plan.kind: plan for plan in plans_for(self._job, *inputs(self._job))}

    @cached_property
    def _maker(self) -> "CacheMaker":
        import torch  # late: only actors need it

        from toile.diffusion.bundle import Bundle
        from toile.training.cache_maker import CacheMaker
        from toile.training.data import read_examples

        job = self._job
        base, dataset = inputs(job)
        base_path = patiently(job, PHASE, lambda: fetch(job.store, base.artifact, job.cache_path))
        folder = patiently(job, PHASE, lambda: fetch(job.store, dataset.artifact, job.cache_path))
        device = torch.device("cuda" if self._gpus else "cpu")
        bundle = Bundle.load(base_path, digest=base.digest, device=device)
        return CacheMaker(job, bundle, read_examples(folder), tells=False)
