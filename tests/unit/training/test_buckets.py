"""Images that keep their shape: orders, exactness, and a training from photographs to a version."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, multiprocessing

from integration.training_platform import DATASET, control_request_of, request_of
from toile.core.artifacts import ArtifactStore, fetch, publish_folder
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import DatasetItemRow, DatasetVersionRow, JobRow, ModelVersionRow
from toile.core.errors import FailedPreconditionError
from toile.core.jobs import JobState
from toile.core.settings import Settings
from toile.dataset.build.job import Item
from toile.diffusion.adapters import load_lora
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.imaging import png
from toile.imaging.buckets import bucket_crop, nearest_bucket
from toile.train.handler import TrainHandler
from toile.training import batches
from toile.training.buckets import BucketOrder, one_bucket
from toile.training.checkpoint import Checkpoint
from toile.training.checks import hold_out
from toile.training.data import batch_indices
from toile.training.run import train_and_publish
from unit.training.runs import (
    BUCKET_TIME_IDS,
    CONFIG,
    Run,
    base_scheduler,
    bucketed_cache,
    bucketed_rank,
    made_up_cache,
    small_unet,
)

BUCKETS = [list(range(10)), [], [10, 11, 12], list(range(13, 20))]


def bucket_of(indices: list[int]) -> int:
    (number,) = {n for n, bucket in enumerate(BUCKETS) for i in indices if i in bucket}
    return number


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_every_image_is_shown_once_in_each_permutation_of_its_bucket(batch_size: int) -> None:
    order = BucketOrder(BUCKETS, batch_size, seed=3)
    steps = [order(step) for step in range(20 * batch_size)]  # 20 epochs of 20 images
    assert {len(indices) for indices in steps} == {batch_size}
    for bucket in filter(None, BUCKETS):
        shown = [index for indices in steps for index in indices if index in bucket]
        for first in range(0, len(shown) - len(bucket) + 1, len(bucket)):
            assert sorted(shown[first : first + len(bucket)]) == bucket
        share = len(shown) / (20 * batch_size * batch_size)
        assert share == pytest.approx(len(bucket) / 20, abs=1.5 / (20 * batch_size) * 3)
    assert all(bucket_of(indices) in (0, 2, 3) for indices in steps)


def test_batches_that_come_out_even_show_each_image_once_an_epoch() -> None:
    order = BucketOrder([[0, 1, 2, 3], [4, 5]], 2, seed=0)
    for epoch in range(6):
        shown = [index for step in range(3) for index in order(3 * epoch + step)]
        assert sorted(shown) == [0, 1, 2, 3, 4, 5]


def test_the_order_is_a_function_of_seed_and_step() -> None:
    order = BucketOrder(BUCKETS, 4, seed=3)
    forwards = [order(step) for step in range(40)]
    assert [BucketOrder(BUCKETS, 4, seed=3)(step) for step in reversed(range(40))] == forwards[::-1]
    assert [BucketOrder(BUCKETS, 4, seed=4)(step) for step in range(40)] != forwards
    labels = [bucket_of(indices) for indices in forwards]
    assert labels[:20] != labels[20:], "the order of buckets is drawn anew"


def test_one_bucket_is_shown_as_squares_are() -> None:
    images = list(range(5, 12))
    order = BucketOrder([images], 3, seed=9)
    for step in range(20):
        assert order(step) == [images[i] for i in batch_indices(7, 3, step, 9)]


def test_the_unet_is_told_what_each_image_was_cut_from(scheduler: DDPMScheduler) -> None:
    config = CONFIG.model_copy(update={"gradient_accumulation_steps": 2, "caption_dropout": 0.0})
    told: list[tuple[tuple[int, ...], Tensor]] = []

    def watch(
        _: object, inputs: tuple[Tensor, ...], options: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        told.append((tuple(inputs[0].shape[-2:]), options["added_cond_kwargs"]["time_ids"]))

    def run(cache: object) -> None:
        told.clear()
        unet = small_unet()
        unet.register_forward_pre_hook(watch, with_kwargs=True)
        Run(unet, cache, scheduler, config)  # type: ignore[arg-type]

    run(bucketed_cache())
    assert len(told) == 12
    known = {tuple(row) for row in BUCKET_TIME_IDS.tolist()}
    assert {tuple(row) for _, ids in told for row in ids.tolist()} == known
    for shape, ids in told:
        assert [tuple(row) for row in (ids[:, 4:] / 8).int().tolist()] == [shape] * len(ids)
    run(made_up_cache())
    assert {tuple(row) for _, ids in told for row in ids.tolist()} == {(128, 128, 0, 0, 128, 128)}


def test_squares_in_one_bucket_train_as_without_buckets(scheduler: DDPMScheduler) -> None:
    config = CONFIG.model_copy(update={"validation_share": 0.25, "validation_interval_steps": 2})
    plain = Run(small_unet(), made_up_cache(), scheduler, config).end
    bucketed = Run(small_unet(), one_bucket(made_up_cache(), 128), scheduler, config).end
    assert plain.to_files() == bucketed.to_files()


def test_two_interruptions_change_nothing(scheduler: DDPMScheduler) -> None:
    config = CONFIG.model_copy(
        update={
            "checkpoint_interval_steps": 2,
            "validation_share": 0.25,
            "validation_interval_steps": 3,
            "gradient_accumulation_steps": 2,
        }
    )

    def run(start: Checkpoint | None) -> tuple[Checkpoint, dict[int, Checkpoint]]:
        kept: dict[int, Checkpoint] = {}
        end = Run(
            small_unet(),
            bucketed_cache(),
            scheduler,
            config,
            start,
            keep=lambda point: kept.setdefault(point.step, point),  # type: ignore[arg-type, return-value]
        ).end
        return end, kept

    whole, first = run(None)
    _, second = run(first[2])
    rest, _ = run(second[4])
    assert whole.to_files() == rest.to_files()
    assert whole.validations


@pytest.mark.integration  # two more processes import torch
def test_two_ranks_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)
    config = CONFIG.model_copy(
        update={
            "steps": 4,
            "validation_share": 0.25,
            "validation_interval_steps": 2,
            "batch_size": 3,
        }
    )
    one = Run(small_unet(), bucketed_cache(), base_scheduler(), config).end
    multiprocessing.spawn(bucketed_rank, (2, config, tmp_path), nprocs=2)
    first, second = (Checkpoint.from_folder(tmp_path / str(rank)) for rank in (0, 1))
    assert first.to_files() == second.to_files()
    assert first.losses == pytest.approx(one.losses, abs=1e-6)
    assert first.validations == pytest.approx(one.validations, abs=1e-6)


SIZES = [(400, 533), (533, 400), (300, 300), (400, 533), (640, 400), (360, 640)]


@pytest.fixture
def mixed(settings: Settings, catalog: Catalog, store: ArtifactStore) -> DatasetVersionRow:
    """A version of portraits, landscapes and a square, published."""
    folder = settings.home_path / "mixed"
    random = np.random.default_rng(5)
    lines = []
    for index, size in enumerate(SIZES):
        coarse = Image.fromarray(random.integers(0, 255, (6, 6, 3)).astype(np.uint8)).resize(size)
        image, offsets = bucket_crop(coarse, nearest_bucket(size, 128))
        mask = Image.new("L", image.size)
        mask.paste(1, (16, 16, 80, 80))
        for kind, picture in (("images", image), ("masks", mask)):
            path = folder / kind / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png.encode(picture))
        item = Item(
            f"images/{index}.png", f"<lace> dress {index % 2}", "", f"masks/{index}.png",
            f"{index}.jpg", "0" * 64, *image.size, False,
            original_size=size, crop_left_top=offsets,
        )  # fmt: skip
        lines.append(item.to_json() + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    row = DatasetVersionRow(
        name=f"{DATASET}/versions/2",
        dataset=DATASET,
        number=2,
        digest=publish_folder(store, f"{DATASET}/versions/2/made", folder).digest,
        artifact=f"{DATASET}/versions/2/made",
        trigger_word="<lace>",
        resolution=128,
        aspect="keep",
        image_count=len(SIZES),
        rejected=[],
        job="projects/p/jobs/mixed",
    )
    with catalog.transaction() as session:
        session.add(row)
        session.flush()
        session.add_all(
            DatasetItemRow(
                version=row.name,
                file_name=f"images/{index}.png",
                caption=f"<lace> dress {index % 2}",
                caption_imported=True,
                source_file_name=f"{index}.jpg",
                source_digest="0" * 64,
            )
            for index in range(len(SIZES))
        )
    return row


@pytest.mark.usefixtures("quick_samples", "mixed")
def test_photographs_of_several_shapes_become_a_version_that_draws_at_theirs(
    train: Callable[..., JobRow],
    catalog: Catalog,
    store: ArtifactStore,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    job = train(
        train_and_publish,
        masked_loss=True,
        repeats={"2.jpg": 2},
        validation_share=0.2,
        validation_interval_steps=2,
        steps=6,
    )
    assert (job.state, job.error_message) == (JobState.SUCCEEDED, "")
    with catalog.reading() as session:
        version = session.get_one(ModelVersionRow, job.target)
    assert version.dataset_version == f"{DATASET}/versions/2"
    lora = load_lora(fetch(store, version.artifact, tmp_path))
    facts = json.loads(lora.header["ss_bucket_info"])["buckets"].values()
    counted = {tuple(bucket["resolution"]): bucket["count"] for bucket in facts}
    names = [f"images/{index}.png" for index in range(len(SIZES))]
    shown, (held_out,) = hold_out(names, 0.2)
    repeated = [*shown, 2] if 2 in shown else shown
    assert counted == Counter(nearest_bucket(SIZES[index], 128) for index in repeated)
    assert held_out not in shown
    assert len(counted) > 1
    bundle = Bundle.load(tiny_bundle)
    request = DiffusionRequest(
        prompt="a lace dress", seeds=[1], steps=2, width=96, height=160,
        adapters=[LoadedAdapter("lace", lora, 1.0)],
    )  # fmt: skip
    assert next(diffuse(bundle, TorchDenoiser(bundle), request)).size == (96, 160)


@pytest.mark.usefixtures("mixed")
def test_what_cannot_be_trained_on_buckets_is_refused_before_it_is_queued(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    handler = TrainHandler(settings, catalog, store)

    def refused(request: object) -> str:
        with pytest.raises(FailedPreconditionError) as caught:
            handler.create(request)  # type: ignore[arg-type]
        assert caught.value.reason == "DATASET_ASPECT"
        return caught.value.metadata["field"]

    class_prompt = request_of(class_prompt="a dress", class_image_count=2)
    assert refused(class_prompt) == "lora.class_prompt"
    assert refused(control_request_of()) == "dataset"
    with catalog.transaction() as session:
        session.get_one(DatasetVersionRow, f"{DATASET}/versions/2").resolution = 256
    assert refused(request_of()) == "dataset"
