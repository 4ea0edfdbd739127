"""From trained weights to a published version: export, reload, compare, publish.

A version is published only if other programs would take its files whole, and if these, loaded
afresh and drawn with as the server draws, give what the trainer's own weights drew.
"""

import gc
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from toile import __version__
from toile.core.artifacts import Manifest, publish_folder
from toile.core.catalog.models import DatasetVersionRow, ModelVersionRow
from toile.core.errors import ToileError
from toile.core.jobs.runtime import JobContext
from toile.core.jobs.samples import SAMPLES_FOLDER, JobSamples, mean_scores
from toile.core.names import ModelVersionName
from toile.diffusion.adapter_header import AdapterCard, TrainingImages
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import Denoiser, TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.triton.packed import packed_folder
from toile.diffusion.turns import Urgency
from toile.training.batches import compute_dtype
from toile.training.checkpoint import Checkpoint
from toile.training.checks import hold_out
from toile.training.config import RecipeConfig
from toile.training.data import Example
from toile.training.events import EVENTS_FOLDER, copy_events, events_path
from toile.training.loop import smoothed
from toile.training.patience import patiently, report
from toile.training.recipe import Judged, Recipe
from toile.training.repeats import repeat_counts
from toile.training.state import published_step

REPRODUCTION_TOLERANCE_LEVELS = 2.0
"""Largest difference of a pixel, of 255: both are drawn in fp32, in another order of arithmetic.

The tiny base's come to 1 at most. bf16, which training uses on CPUs, would make it 12: too much to
tell a file that is right from one that is slightly wrong.
"""

LOSS_FILE = "loss.jsonl"


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    config: RecipeConfig
    recipe: Recipe
    end: Checkpoint
    samples: Sequence[Image.Image]
    judged: Judged
    base: str
    bundle: Bundle
    dataset: DatasetVersionRow
    examples: Sequence[Example]


def draw_samples(
    job: JobContext, bundle: Bundle, config: RecipeConfig, recipe: Recipe
) -> list[Image.Image]:
    """Draw the sample prompts with what was trained, in fp32 as engines do.

    Raises:
        CancelledError: The job should stop.
    """
    denoiser = TorchDenoiser(bundle, autocast=torch.float32)
    images: list[Image.Image] = []
    for index in range(len(config.sample_prompts)):
        report(job, "sample", index, len(config.sample_prompts))
        fields = recipe.trained(index)
        images.append(draw_sample(job, bundle, config, index, fields, denoiser))
    return images


def draw_sample(
    job: JobContext,
    bundle: Bundle,
    config: RecipeConfig,
    index: int,
    fields: Mapping[str, Any],
    denoiser: Denoiser | None = None,
) -> Image.Image:
    """Draw one of the sample prompts, with these fields of the request.

    Args:
        job: That it is drawn for.
        bundle: The base.
        config: The recipe's configuration.
        index: Of the sample.
        fields: Of the request.
        denoiser: What evaluates the UNet; if None the bundle's own, as it is trained.

    Raises:
        CancelledError: The job should stop.
    """
    request = DiffusionRequest(
        prompt=config.sample_prompts[index],
        seeds=[sample_seed(config, index)],
        urgency=Urgency(cancelled=job.stopping),
        **fields,
    )
    # As it is trained: weights that are held in half precision can be drawn with in no other.
    denoiser = denoiser or TorchDenoiser(bundle, autocast=compute_dtype(config, bundle.device))
    return next(diffuse(bundle, denoiser, request))


def sample_seed(config: RecipeConfig, index: int) -> int:
    """The seed of one of the samples, the same whenever it is drawn."""
    return (config.seed + index) % (1 << 63)


def publish(job: JobContext, trained: Trained) -> None:
    """Publish a trained adapter as the job's target, which ends the job.

    Raises:
        InvalidArgumentError: The exported files cannot be loaded.
        ToileError: Another program would not take a file (`NOT_CONFORMANT`), or the server would
            not draw the sample with it (`NOT_REPRODUCED`); metadata say which.
        CancelledError: The job was cancelled meanwhile; nothing is published.
    """
    folder, bank = (job.scratch_path / f"{name}-{job.attempt}" for name in ("export", "bank"))

    def export() -> None:
        for path in (folder, bank):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        _export(job, trained, folder)
        trained.recipe.pack(folder, bank)

    patiently(job, "publish", export)
    _release(trained)
    report(job, "verify", 0, 1)
    difference = verify(trained, folder, bank, job)
    report(job, "publish", 0, 1)
    prefix = f"{job.target}/{job.name.rpartition('/')[2]}-{job.attempt}"

    def upload() -> Manifest:
        for file in bank.iterdir():
            job.store.put(f"{packed_folder(prefix)}/{file.name}", file)
        return publish_folder(job.store, prefix, folder, {"job": job.name})

    manifest = patiently(job, "publish", upload)

    def end() -> None:
        with job.catalog.transaction() as session:
            session.add(_version_row(job, trained, prefix, manifest, difference))
            job.succeed(session)

    patiently(job, "publish", end)


def _release(trained: Trained) -> None:
    """Make room for the same networks, loaded afresh: on a GPU both may be too much."""
    trained.recipe.release()
    trained.bundle.unload()
    gc.collect()  # optimizers and pipelines have cycles
    torch.cuda.empty_cache()


def verify(trained: Trained, folder: Path, bank: Path, job: JobContext) -> float:
    """Check the files of a version, and draw the closing sample with them as the server would.

    Args:
        trained: The training.
        folder: Its exported files.
        bank: What was packed of them.
        job: That the sample is drawn for.

    Returns:
        How far it is from the trainer's own: the largest difference of a pixel, in 8-bit levels;
        0 where there are no sample prompts.

    Raises:
        ToileError: A file does not conform (`NOT_CONFORMANT`), or the difference is over
            `REPRODUCTION_TOLERANCE_LEVELS` (`NOT_REPRODUCED`); metadata say which file.
    """
    trained.recipe.check(folder)
    if not trained.samples:
        return 0.0
    index = len(trained.samples) - 1
    base = trained.bundle
    fresh = Bundle.load(base.path, digest=base.digest, device=base.device)
    served = trained.recipe.served(folder, bank, fresh, index)
    again = draw_sample(job, fresh, trained.config, index, served.fields, served.denoiser)
    mine = np.asarray(trained.samples[index].convert("RGB"), dtype=np.int16)
    theirs = np.asarray(again.convert("RGB"), dtype=np.int16)
    difference = float(np.abs(mine - theirs).max())
    if difference > REPRODUCTION_TOLERANCE_LEVELS:
        raise ToileError(
            f"{served.file} draws another sample: {difference:g} of 255 levels apart, "
            f"more than {REPRODUCTION_TOLERANCE_LEVELS:g}",
            reason="NOT_REPRODUCED",
            metadata={"file": served.file},
        )
    return difference


def _export(job: JobContext, trained: Trained, folder: Path) -> None:
    # First, for the store may be away, and then the rest is not done in vain.
    for path, content in JobSamples(job.store, job.name).files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    config = trained.config
    row = job.jobs.get(job.name)
    images, held_out_count = _shown(trained)
    class_prompt, class_image_count = config.class_images
    card = AdapterCard(
        title=f"{job.target.split('/')[3]} v{job.target.rpartition('/')[2]}",
        base=trained.base,
        base_digest=trained.bundle.digest,
        resolution=trained.bundle.native_size,
        trigger_word=trained.dataset.trigger_word,
        dataset_version=trained.dataset.name,
        dataset_digest=trained.dataset.digest,
        prediction_type=trained.bundle.scheduler_config.get("prediction_type", "epsilon"),
        images=images,
        held_out_count=held_out_count,
        class_prompt=class_prompt,
        class_image_count=class_image_count,
        seed=config.seed,
        learning_rate=config.learning_rate,
        steps=len(trained.end.losses),
        created=row.start_time,  # of the first attempt, whichever attempt ends
    )
    trained.recipe.export(folder, card)
    (folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
    for index, image in enumerate(trained.samples):
        image.save(folder / SAMPLES_FOLDER / f"{index:02d}.png")
    for path, content in trained.judged.files.items():
        (folder / path).write_bytes(content)
    copy_events(events_path(job), folder / EVENTS_FOLDER)
    (folder / LOSS_FILE).write_text("".join(_loss_lines(trained)), encoding="utf-8")
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _loss_lines(trained: Trained) -> Iterator[str]:
    """A line of JSON for each step: its loss, how it was judged, and which one is published.

    One that changed no weights is marked, too.
    """
    end, published = trained.end, published_step(trained.end, trained.config)
    for step, loss in enumerate(end.losses, start=1):
        entry: dict[str, Any] = {"step": step, "loss": loss}
        if step in end.validations:
            entry["validation_loss"] = end.validations[step]
        if step in end.judgements:
            entry["sample_scores"] = mean_scores(end.judgements[step])
        if step in end.skipped:
            entry["skipped"] = True
        if step == published:
            entry["published"] = True
        yield json.dumps(entry) + "\n"


def _version_row(
    job: JobContext, trained: Trained, prefix: str, manifest: Manifest, difference: float
) -> ModelVersionRow:
    name = ModelVersionName.parse(job.target)
    metrics = _metrics(trained)
    return ModelVersionRow(
        name=str(name),
        model=str(name.model_name),
        number=int(name.version),
        adapter_type=trained.config.RECIPE,
        artifact=prefix,
        digest=manifest.digest,
        base=trained.base,
        dataset_version=trained.dataset.name,
        dataset_digest=trained.dataset.digest,
        trigger_word=trained.dataset.trigger_word,
        config=trained.config.model_dump(mode="json"),
        final_loss=smoothed(trained.end.losses[: metrics["published_step"]]),
        metrics=metrics,
        reproduction_difference=difference,
        code_version=__version__,
        files=[
            {"path": path, "size_bytes": entry.size_bytes, "digest": entry.digest}
            for path, entry in sorted(manifest.files.items())
        ],
        job=job.name,
    )


def _metrics(trained: Trained) -> dict[str, Any]:
    """What was measured of the published weights: fields of `VersionMetrics`."""
    end, step = trained.end, published_step(trained.end, trained.config)
    metrics: dict[str, Any] = {"published_step": step, "steps": end.step, **trained.judged.metrics}
    if step in end.validations:
        metrics["validation_loss"] = end.validations[step]
    if step in end.judgements:
        metrics["sample_scores"] = mean_scores(end.judgements[step])
    return metrics


def _shown(trained: Trained) -> tuple[list[TrainingImages], int]:
    """The images that were trained on, by how often each is shown; and the others' number."""
    examples, config = trained.examples, trained.config
    repeats = repeat_counts(
        config.repeats, [example.source_name for example in examples], recipe=config.RECIPE
    )
    chosen, held_out = hold_out(
        [example.file_name for example in examples], config.validation_share, recipe=config.RECIPE
    )
    by_count: dict[int, list[Example]] = {}
    for place in chosen:
        by_count.setdefault(repeats[place], []).append(examples[place])
    native_size = trained.bundle.native_size
    images = [
        TrainingImages(
            [example.caption for example in shown],
            count,
            [example.size(native_size) for example in shown],
        )
        for count, shown in sorted(by_count.items())
    ]
    return images, len(held_out)
