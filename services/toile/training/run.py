"""A training from its job's specification to the published version, on one rank."""

import logging
import time

from diffusers import DDPMScheduler

from toile.core.artifacts import fetch
from toile.core.catalog.models import BaseRow, DatasetVersionRow
from toile.core.errors import NotFoundError, StoreUnavailableError
from toile.core.jobs.runtime import JobContext
from toile.diffusion.bundle import Bundle
from toile.training import lora, publish
from toile.training.caches import Cache, build_cache
from toile.training.checkpoint import (
    Checkpoint,
    delete_folder,
    load_checkpoint,
    save_checkpoint,
)
from toile.training.config import LoraRecipeConfig
from toile.training.data import Example, read_examples

REPORT_INTERVAL_SECONDS = 0.25
_log = logging.getLogger(__name__)


def train_and_publish(job: JobContext, *, rank: int = 0) -> None:
    """Train the job's LoRA; the leading rank publishes it and ends the job.

    Raises:
        CancelledError: The job should stop.
        ToileError: What else went wrong.
    """
    leads = rank == 0
    config = LoraRecipeConfig.checked(job.spec["config"])
    base, dataset = _inputs(job)
    if leads:
        job.report("prepare", 0, 1)
    base_path = fetch(job.store, base.artifact, job.cache_path)
    bundle = Bundle.load(base_path, digest=base.digest)
    examples = read_examples(fetch(job.store, dataset.artifact, job.cache_path))
    job.check()
    cache = _encoded(job, bundle, examples, dataset, leads=leads)
    lora.add_adapter(bundle.unet, config)
    end = _train(job, bundle, cache, examples, config, leads=leads)
    if leads:
        trained = publish.Trained(
            config=config,
            state=lora.adapter_state(bundle.unet),
            losses=end.losses,
            validations=end.validations,
            samples=publish.draw_samples(job, bundle, config),
            base=base.name,
            base_path=base_path,
            base_digest=base.digest,
            dataset=dataset,
            captions=[example.caption for example in examples],
        )
        publish.publish(job, trained)
        _forget(job)


def _inputs(job: JobContext) -> tuple[BaseRow, DatasetVersionRow]:
    with job.catalog.reading() as session:
        base = session.get(BaseRow, job.spec["base"])
        dataset = session.get(DatasetVersionRow, job.spec["dataset_version"])
    if base is None or dataset is None:
        raise NotFoundError("the base or the dataset version is gone")
    return base, dataset


def _encoded(
    job: JobContext,
    bundle: Bundle,
    examples: list[Example],
    dataset: DatasetVersionRow,
    *,
    leads: bool,
) -> Cache:
    def on_progress(done: int, total: int) -> None:
        job.check()
        if leads:
            job.report("cache", done, total)

    return build_cache(
        bundle,
        examples,
        job.cache_path,
        dataset_digest=dataset.digest,
        on_progress=on_progress,
    )


def _train(
    job: JobContext,
    bundle: Bundle,
    cache: Cache,
    examples: list[Example],
    config: LoraRecipeConfig,
    *,
    leads: bool,
) -> Checkpoint:
    start = load_checkpoint(job.store, _checkpoints(job), job.scratch_path)
    if start is not None:
        _log.info("going on from step %d", start.step)
    end = lora.train(
        bundle.unet,
        cache,
        [example.file_name for example in examples],
        DDPMScheduler.from_config(bundle.scheduler_config),
        config,
        native_size=bundle.native_size,
        start=start,
        on_step=_Reporter(job) if leads else _ignore,
        on_checkpoint=lambda point: _keep(job, point) if leads else None,
        stopped=job.cancelled,
    )
    if leads and (start is None or start.step < end.step):
        _keep(job, end)
    return end


class _Reporter:
    """Reports steps, as often as a person can read; the last one and validations always."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._reported = 0.0

    def __call__(self, report: lora.StepReport) -> None:
        matters = report.step == report.total_steps or report.validation_loss is not None
        if not matters and time.monotonic() - self._reported < REPORT_INTERVAL_SECONDS:
            return
        self._reported = time.monotonic()
        self._job.report(
            "train",
            report.step,
            report.total_steps,
            loss=report.loss,
            learning_rate=report.learning_rate,
            images_per_second=report.images_per_second,
            seconds_left=report.seconds_left,
            **_validation(report),
        )


def _validation(report: lora.StepReport) -> dict[str, str]:
    if report.validation_loss is None:
        return {}
    return {"message": f"validation loss {report.validation_loss:.4f}"}


def _ignore(_report: lora.StepReport) -> None:
    """What ranks that do not lead report."""


def _keep(job: JobContext, point: Checkpoint) -> None:
    """Save a checkpoint; a store that is away costs only that one."""
    try:
        save_checkpoint(job.store, _checkpoints(job), point)
    except StoreUnavailableError as error:
        _log.warning("no checkpoint at step %d: %s", point.step, error.message)


def _forget(job: JobContext) -> None:
    """Remove the checkpoints of a job that succeeded."""
    try:
        delete_folder(job.store, _checkpoints(job))
    except StoreUnavailableError as error:
        _log.warning("checkpoints are left behind: %s", error.message)


def _checkpoints(job: JobContext) -> str:
    return f"{job.name}/checkpoints"
