"""Images of the class that a style belongs to: drawn once, and trained on beside the dataset's."""

import errno
import io
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.errors import ToileError
from toile.core.jobs import JobKind, JobState, JobStore
from toile.core.jobs.runtime import JobContext, execute
from toile.core.settings import Settings
from toile.diffusion.bundle import Bundle
from toile.diffusion.pipelines import diffuse
from toile.training import class_images, noise_prediction, patience, validation
from toile.training.batches import Batch, loss_sum, make_batch
from toile.training.caches import Cache, WeightedCache
from toile.training.checkpoint import Checkpoint
from toile.training.masks import loss_weights
from toile.training.run import train_and_publish
from unit.training.runs import CLASS_CONFIG, CONFIG, NAMES, Run, with_class

TIME_IDS = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
SHELF = "projects/p/class-images/"
Train = Callable[..., JobRow]


def test_a_step_shows_as_many_of_the_class_each_once_an_epoch(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[list[int]] = []

    def watched(cache: Cache, indices: list[int], *rest: object) -> Batch:
        shown.append(indices)
        return make_batch(cache, indices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(noise_prediction, "make_batch", watched)
    Run(make_unet(), cache, scheduler, CONFIG)
    without = shown.copy()
    shown.clear()
    Run(make_unet(), with_class(cache), scheduler, CLASS_CONFIG)
    assert [indices[:2] for indices in shown] == without, "the dataset's are those they would be"
    drawn = [index for indices in shown for index in indices[2:]]
    assert [sorted(drawn[first : first + 3]) for first in range(0, 12, 3)] == [[4, 5, 6]] * 4


def test_the_loss_is_that_of_the_images_and_the_weighed_one_of_the_class(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    unet = make_unet()

    def loss(examples: Cache, indices: list[int]) -> float:
        batch = make_batch(examples, indices, CONFIG, 0, scheduler)
        with torch.no_grad():
            return float(loss_sum(unet, batch, scheduler, CONFIG, TIME_IDS))

    images = loss(cache, [0, 1])
    of_class = loss(with_class(cache), [0, 1, 4, 6]) - images
    assert of_class > 0.1
    weighed = loss(with_class(cache, 0.25), [0, 1, 4, 6])
    assert weighed == pytest.approx(images + 0.25 * of_class, rel=1e-3)


def test_images_of_the_class_count_whole_beside_masked_ones(cache: Cache) -> None:
    shares = torch.zeros(len(NAMES), 1, 16, 16)
    shares[..., 4:12, 4:12] = 1.0
    masked = WeightedCache(**vars(cache), weights=loss_weights(shares, 0.0))
    weights = with_class(masked, 0.5).weights
    assert torch.equal(weights[: len(NAMES)], masked.weights)
    assert torch.equal(weights[len(NAMES) :], torch.full((3, 1, 16, 16), 0.5))


def test_captions_of_the_class_are_its_prompt_and_are_dropped_alike(
    cache: Cache, scheduler: DDPMScheduler
) -> None:
    both = with_class(cache)
    for share, text in ((0.0, 3), (1.0, 0)):
        config = CONFIG.model_copy(update={"caption_dropout": share})
        batch = make_batch(both, [4, 5], config, 0, scheduler)
        assert torch.equal(batch.embeds, both.embeds[[text, text]])
        assert torch.equal(batch.pooled, both.pooled[[text, text]])


def test_a_run_with_a_class_resumes_exactly_and_validates_without_it(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CLASS_CONFIG.model_copy(
        update={
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "validation_share": 0.25,
            "validation_interval_steps": 2,
            "ema_decay": 0.9,
        }
    )
    validated: set[int] = set()
    assembled = validation.assembled

    def watched(cache: Cache, indices: list[int], *rest: object, **drawn: object) -> Batch:
        validated.update(indices)
        return assembled(cache, indices, *rest, **drawn)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "assembled", watched)
    kept: list[Checkpoint] = []
    whole = Run(make_unet(), with_class(cache), scheduler, config, keep=kept.append)
    rest = Run(make_unet(), with_class(cache), scheduler, config, kept[0])
    assert [report.step for report in rest.reports] == [4, 5, 6]
    assert whole.end.to_files() == rest.end.to_files()
    assert len(validated) == 1
    assert validated < set(range(len(NAMES)))
    other = Run(make_unet(), with_class(cache, 0.5), scheduler, config)
    assert other.end.losses != whole.end.losses


def test_the_class_stays_better_known_with_its_images(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    """The dataset's are bright and the class is dark."""
    bright = replace(cache, means=torch.full_like(cache.means, 3.0))
    both = with_class(bright)
    config = CONFIG.model_copy(update={"steps": 60, "learning_rate": 3e-2, "caption_dropout": 0.0})

    def class_loss(unet: UNet2DConditionModel) -> float:
        batch = make_batch(both, [4, 5, 6] * 8, config, 10**6, scheduler)
        with torch.no_grad():
            return float(loss_sum(unet, batch, scheduler, config, TIME_IDS))

    untrained = class_loss(make_unet())
    without = class_loss(Run(make_unet(), bright, scheduler, config).unet)
    holding = class_loss(Run(make_unet(), both, scheduler, config).unet)
    assert without > 1.02 * untrained, "the style costs the class"
    assert holding < 0.98 * untrained


def test_an_image_of_the_class_that_cannot_be_learned_is_named(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    both = with_class(cache)
    both.means[5] = float("nan")
    with pytest.raises(ToileError, match="class image 1") as caught:
        Run(make_unet(), both, scheduler, CLASS_CONFIG)
    assert caught.value.reason == "TRAINING_DIVERGED"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the images of the class that were begun; two denoising steps are enough."""
    seeds: list[int] = []

    def quick(bundle: Bundle, denoiser: object, request: object, **rest: object) -> object:
        seeds.extend(request.seeds)  # type: ignore[attr-defined]
        return diffuse(bundle, denoiser, replace(request, steps=2), **rest)  # type: ignore[type-var, arg-type]

    monkeypatch.setattr(class_images, "diffuse", quick)
    return seeds


def kept(store: ArtifactStore) -> dict[str, str]:
    """Digests of the images of classes that there are."""
    return {info.key: info.digest for info in store.list(SHELF)}


@pytest.mark.usefixtures("quick_samples")
def test_images_are_drawn_once_and_a_larger_count_draws_the_rest(
    train: Train, store: ArtifactStore, drawn: list[int]
) -> None:
    config = {"class_prompt": "a (dress)", "class_image_count": 2, "prior_loss_weight": 0.5}
    row = train(train_and_publish, **config)
    assert (row.state, row.error_message) == (JobState.SUCCEEDED, "")
    assert len(set(drawn)) == 2
    first = kept(store)
    assert [key.rpartition("/")[2] for key in first] == ["00000.png", "00001.png"]
    assert len(set(first.values())) == 2
    assert all(Image.open(io.BytesIO(store.get(key))).size == (128, 128) for key in first)
    train(train_and_publish, **config)
    assert len(drawn) == 2, "nothing is drawn again"
    train(train_and_publish, **{**config, "class_image_count": 3})
    assert len(set(drawn)) == len(drawn) == 3
    assert first.items() < kept(store).items()
    train(train_and_publish, **{**config, "class_prompt": "a skirt"})
    assert len(set(drawn)) == len(drawn) == 5


@pytest.mark.usefixtures("quick_samples")
def test_a_damaged_image_is_drawn_again_by_the_next_training(
    train: Train, settings: Settings, store: ArtifactStore, drawn: list[int]
) -> None:
    config = {"class_prompt": "a dress", "class_image_count": 2}
    train(train_and_publish, **config)
    whole = kept(store)
    (file,) = settings.home_path.rglob("objects/**/00001.png")
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as where a disk forgets
    for info in list(store.list("projects/p/caches/class-images-")):
        store.delete(info.key)
    row = train(train_and_publish, **config)
    assert (row.state, row.error_reason) == (JobState.FAILED, "DATA_LOSS")
    assert train(train_and_publish, **config).state == JobState.SUCCEEDED
    assert kept(store) == whole
    assert len(drawn) == 3


@pytest.mark.usefixtures("quick_samples", "drawn")
def test_a_disk_without_room_for_them_is_waited_for(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = class_images.Shelf.examples
    failures = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def full(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return examples(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(class_images.Shelf, "examples", full)
    row = train(train_and_publish, class_prompt="a dress", class_image_count=1)
    assert (row.state, row.error_message) == (JobState.SUCCEEDED, "")
    assert not failures


@pytest.mark.usefixtures("quick_samples")
@pytest.mark.parametrize("how", ["killed", "paused"])
def test_an_interrupted_drawing_goes_on_where_it_was(
    train: Train,
    settings: Settings,
    store: ArtifactStore,
    catalog: Catalog,
    drawn: list[int],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    jobs = JobStore(catalog)
    report = JobContext.report
    told: list[tuple[int, int]] = []

    def interrupt(job: JobContext, phase: str, step: int, total: int, **figures: float) -> None:
        report(job, phase, step, total, **figures)
        if phase != class_images.PHASE:
            return
        told.append((step, total))
        if step == 1 and job.attempt == 1 and how == "killed":
            raise KeyboardInterrupt
        if step == 1 and job.attempt == 1:
            jobs.request_pause(job.name)
            job._pausing = jobs.heartbeat(job.name, job.attempt)

    config = {"class_prompt": "a dress", "class_image_count": 3}
    with monkeypatch.context() as patch:
        patch.setattr(JobContext, "report", interrupt)
        row = started(train, jobs, how, **config)
        before = kept(store)
        assert len(before) == 1
        if how == "paused":
            assert row.state == JobState.PAUSED
            jobs.resume(row.name)
        else:
            jobs.next_attempt(row.name, after=1)
        assert execute(train_and_publish, settings, row.name, 2) == 0
    assert told == [(0, 3), (1, 3), (1, 3), (2, 3)]
    assert jobs.get(row.name).state == JobState.SUCCEEDED
    whole = kept(store)
    assert before.items() < whole.items()
    for key in (*whole, *(info.key for info in store.list("projects/p/caches/class-images-"))):
        store.delete(key)
    drawn.clear()
    assert train(train_and_publish, **config).state == JobState.SUCCEEDED
    assert kept(store) == whole, "the same images, whatever came in between"


def started(train: Train, jobs: JobStore, how: str, **config: object) -> JobRow:
    """A training that ended in the middle; a killed one leaves another exit code."""
    if how == "paused":
        return train(train_and_publish, **config)
    with pytest.raises(AssertionError):
        train(train_and_publish, **config)
    (row,) = jobs.active(JobKind.TRAINING)
    return row
