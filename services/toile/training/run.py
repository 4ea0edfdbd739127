"""A training from its job's specification to the published version, on one rank."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toile.core.artifacts import delete_folder, fetch
from toile.core.jobs.progress import Figure
from toile.core.jobs.runtime import JobContext
from toile.core.jobs.samples import SAMPLES_FOLDER
from toile.core.jobs.states import CHECKPOINTS_FOLDER
from toile.diffusion.bundle import CPU, Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.training import control_recipe, loop, lora, publish
from toile.training.cache_maker import CacheMaker
from toile.training.cache_plans import CachePlan, inputs, plans_for
from toile.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from toile.training.config import RECIPES, ControlNetRecipeConfig, LoraRecipeConfig, RecipeConfig
from toile.training.data import Example, read_examples
from toile.training.events import Events, events_path, writing
from toile.training.judging import Judge
from toile.training.objective import Objective
from toile.training.patience import PASSING, patiently, report
from toile.training.recipe import Materials, Recipe
from toile.training.repeats import repeat_counts
from toile.training.sampling import Sampler
from toile.training.tracking import tracking

REPORT_INTERVAL_SECONDS = 0.25
_MAKERS: Mapping[str, Callable[[Any, Materials], tuple[Recipe, Objective[Any]]]] = {
    LoraRecipeConfig.RECIPE: lora.make,
    ControlNetRecipeConfig.RECIPE: control_recipe.make,
}
"""What makes each recipe of its configuration."""
_log = logging.getLogger(__name__)


def train_and_publish(
    job: JobContext,
    *,
    rank: int = 0,
    device: torch.device = CPU,
    meet: Callable[[], None] = lambda: None,
) -> None:
    """Train the job's adapter; the leading rank publishes it and ends the job.

    Args:
        job: The job.
        rank: Of this process among those that train together.
        device: Where it computes.
        meet: Returns when all that train together have what they train on.

    Raises:
        CancelledError: The job should stop.
        ToileError: What else went wrong.
    """
    leads = rank == 0
    config = RECIPES[job.spec["recipe"]].checked(job.spec["config"])
    base, dataset = inputs(job)
    if leads:
        report(job, "prepare", 0, 1)
    base_path = _fetched(job, base.artifact)
    bundle = Bundle.load(base_path, digest=base.digest, device=device)
    examples = read_examples(_fetched(job, dataset.artifact))
    job.check()
    plans = plans_for(job, base, dataset)
    recipe, objective = _recipe(job, bundle, examples, plans, config, leads=leads)
    meet()
    end = _train(job, bundle, recipe, objective, examples, config, leads=leads)
    if leads:
        recipe.finish()
        samples = publish.draw_samples(job, bundle, config, recipe)
        plain = TorchDenoiser(bundle, autocast=torch.float32)
        trained = publish.Trained(
            config=config,
            recipe=recipe,
            end=end,
            samples=samples,
            judged=recipe.judged(
                samples,
                lambda index: publish.draw_sample(job, bundle, config, index, {}, plain),
            ),
            base=base.name,
            bundle=bundle,
            dataset=dataset,
            examples=examples,
        )
        publish.publish(job, trained)
        _forget(job)


def _fetched(job: JobContext, artifact: str) -> Path:
    return patiently(job, "prepare", lambda: fetch(job.store, artifact, job.cache_path))


def _recipe(
    job: JobContext,
    bundle: Bundle,
    examples: list[Example],
    plans: Sequence[CachePlan],
    config: RecipeConfig,
    *,
    leads: bool,
) -> tuple[Recipe, Objective[Any]]:
    """What is trained, and what it learns."""
    maker = CacheMaker(job, bundle, examples, tells=leads)
    caches = {plan.kind: maker.obtain(plan) for plan in plans}
    targets = job.settings.engine.targets
    return _MAKERS[config.RECIPE](config, Materials(bundle, examples, caches, targets))


def _train(
    job: JobContext,
    bundle: Bundle,
    recipe: Recipe,
    objective: Objective[Any],
    examples: list[Example],
    config: RecipeConfig,
    *,
    leads: bool,
) -> Checkpoint:
    start = patiently(
        job, "prepare", lambda: load_checkpoint(job.store, _checkpoints(job), job.scratch_path)
    )
    if start is not None:
        _log.info("going on from step %d", start.step)
    repeats = repeat_counts(
        config.repeats, [example.source_name for example in examples], recipe=config.RECIPE
    )
    with _telling(job, config, start, leads=leads) as (on_step, events):
        end = loop.train(
            recipe.network,
            objective,
            [example.file_name for example in examples],
            config,
            start=start,
            repeats=repeats,
            on_step=on_step,
            # Nobody goes on with a job that was cancelled.
            on_checkpoint=lambda point: (
                _keep(job, point) if leads and not job.cancelled() else None
            ),
            stopped=job.stopping,
            samples=_sampler(job, bundle, recipe, examples, config, events) if events else None,
        )
    if leads and (start is None or start.step < end.step):
        _keep(job, end)
    return end


def _sampler(
    job: JobContext,
    bundle: Bundle,
    recipe: Recipe,
    examples: list[Example],
    config: RecipeConfig,
    events: Events,
) -> Sampler:
    judge = Judge(bundle.path, examples) if config.publish_weights == "best_samples" else None
    return Sampler(job, bundle, config, recipe, judge, events)


@contextlib.contextmanager
def _telling(
    job: JobContext, config: RecipeConfig, start: Checkpoint | None, *, leads: bool
) -> Iterator[tuple[Callable[[loop.StepReport], None], Events | None]]:
    """What is told of each step: progress, events and W&B; and the events, of the leader."""
    if not leads:
        yield _ignore, None
        return
    reporter = _Reporter(job)
    with writing(events_path(job), start) as events, tracking(job, config) as track:

        def tell(report: loop.StepReport) -> None:
            events.step(report)
            track(report)
            reporter(report)

        yield tell, events


class _Reporter:
    """Reports steps, as often as a person can read; the last one and validations always."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._reported = 0.0

    def __call__(self, step: loop.StepReport) -> None:
        is_last = step.step == step.total_steps
        matters = is_last or step.validation_loss is not None or step.skipped
        if not matters and time.monotonic() - self._reported < REPORT_INTERVAL_SECONDS:
            return
        self._reported = time.monotonic()
        report(
            self._job,
            "train",
            step.step,
            step.total_steps,
            loss=step.loss,
            learning_rate=step.learning_rate,
            images_per_second=step.images_per_second,
            seconds_left=step.seconds_left,
            **_where_known(step),
        )


def _where_known(step: loop.StepReport) -> dict[str, Figure]:
    """Figures that not every step or machine has."""
    figures: dict[str, Figure] = {}
    if step.skipped:
        figures["message"] = f"step {step.step} changed nothing: its fp16 gradients overflowed"
    if step.validation_loss is not None:
        figures["validation_loss"] = step.validation_loss
    if torch.cuda.is_available():
        figures["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def _ignore(_report: loop.StepReport) -> None:
    """What ranks that do not lead report."""


def _keep(job: JobContext, point: Checkpoint) -> None:
    """Save a checkpoint; a store that is away, or full, costs only that one."""
    try:
        save_checkpoint(job.store, _checkpoints(job), point)
    except PASSING as error:
        _log.warning("no checkpoint at step %d: %s", point.step, error.message)


def _forget(job: JobContext) -> None:
    """Remove what a job that succeeded needed while it ran."""
    shutil.rmtree(events_path(job), ignore_errors=True)
    try:
        delete_folder(job.store, _checkpoints(job))
        delete_folder(job.store, f"{job.name}/{SAMPLES_FOLDER}")  # the version has them
    except PASSING as error:
        _log.warning("checkpoints or samples are left behind: %s", error.message)


def _checkpoints(job: JobContext) -> str:
    return f"{job.name}/{CHECKPOINTS_FOLDER}"
