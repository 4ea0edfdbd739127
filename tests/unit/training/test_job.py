"""A training from its job to the published version, without Ray."""

import functools
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sqlalchemy import update
from transformers import PreTrainedModel

from integration.training_platform import request_of
from toile.core.artifacts import ArtifactStore, fetch
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import BaseRow, DatasetVersionRow, JobRow, ModelVersionRow
from toile.core.errors import FailedPreconditionError, ToileError
from toile.core.jobs import JobState, JobStore, runtime
from toile.core.jobs.convert import job_message
from toile.core.jobs.costs import Usage
from toile.core.jobs.runtime import JobContext, execute
from toile.core.prompts import CHUNK_TOKENS
from toile.core.settings import EngineSettings, Prices, Settings
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import AdapterWeights, load_lora, write_adapter
from toile.diffusion.bank import PackedAdapter
from toile.diffusion.banked_unet import TRANSFORMER_TARGETS, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.triton.packed import PackedFiles, empty_unet
from toile.serving.models import Models
from toile.train.convert import VersionView, version_message
from toile.train.handler import TrainHandler
from toile.training import caches, lora, publish, run
from toile.training.cache_maker import CacheMaker
from toile.training.cache_plans import CachePlan
from toile.training.data import Example, read_examples
from toile.training.run import train_and_publish
from toile.v1 import inference_pb2
from unit.training.event_files import shown

VERSION = "projects/p/models/lace-style/versions/1"


pytestmark = pytest.mark.usefixtures("quick_samples")
Train = Callable[..., JobRow]


def version_of(catalog: Catalog) -> ModelVersionRow | None:
    with catalog.reading() as session:
        return session.get(ModelVersionRow, VERSION)


def test_training_becomes_a_version(
    train: Train, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    with catalog.transaction() as session:  # images are scaled down to the base's own size
        session.execute(update(DatasetVersionRow).values(resolution=256))
    job = train(train_and_publish)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    assert version.reproduction_difference <= publish.REPRODUCTION_TOLERANCE_LEVELS
    assert version.dataset_version == "projects/p/datasets/lace/versions/1"
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    assert sorted(file["path"] for file in version.files) == [
        "config.json",
        "kohya.safetensors",
        "loss.jsonl",
        "pytorch_lora_weights.safetensors",
        "samples/00.png",
        "tensorboard/events.out.tfevents.0000",
    ]
    losses = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4]
    assert version.final_loss == pytest.approx(np.mean([entry["loss"] for entry in losses]))
    assert Image.open(folder / "samples/00.png").size == (128, 128)
    weights = load_lora(folder)
    assert weights.header["modelspec.trigger_phrase"] == "<lace>"
    assert weights.header["modelspec.resolution"] == "128x128"
    assert any(layer.up.abs().sum() > 0 for layer in weights.layers.values())
    assert not list(store.list(f"{job.name}/checkpoints/"))


def test_a_training_in_fp16_is_drawn_in_it_and_says_what_it_skipped(
    train: Train,
    catalog: Catalog,
    store: ArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    job = train(train_and_publish, mixed_precision="fp16", steps=2)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    assert version.reproduction_difference <= publish.REPRODUCTION_TOLERANCE_LEVELS
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert [entry.get("skipped") for entry in lines] == [True, True]
    events, _ = JobStore(catalog).events_after(job.name, 0)
    said = [event.progress.get("message") or "" for event in events if event.progress]
    assert sum("fp16 gradients overflowed" in message for message in said) == 2


def test_validations_are_told_and_published(
    train: Train, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    job = train(train_and_publish, validation_share=0.25, validation_interval_steps=3)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    losses = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    validated = {e["step"]: e["validation_loss"] for e in losses if "validation_loss" in e}
    assert list(validated) == [3, 4]
    best = min(validated, key=lambda step: validated[step])
    assert version.metrics == {
        "published_step": best,
        "steps": 4,
        "validation_loss": validated[best],
    }
    assert version.final_loss == pytest.approx(np.mean([e["loss"] for e in losses[:best]]))
    assert version_message(VersionView(version, [])).metrics.validation_loss == validated[best]
    events, _ = JobStore(catalog).events_after(job.name, 0)
    told = [e.progress.get("validation_loss") for e in events if e.progress]
    assert list(validated.values()) == [loss for loss in told if loss is not None]


@pytest.mark.parametrize("where", ["train", "sample"])
def test_a_paused_training_publishes_the_weights_of_an_unpaused_one(
    train: Train,
    settings: Settings,
    catalog: Catalog,
    store: ArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    train(train_and_publish)
    whole = version_of(catalog)
    assert whole is not None
    jobs = JobStore(catalog)
    report = JobContext.report

    def pause(job: JobContext, phase: str, step: int, *rest: int, **figures: float | str) -> None:
        """Ask for a pause after three of four steps, or before a sample is drawn."""
        report(job, phase, step, *rest, **figures)
        if phase == where and (phase == "sample" or step == 3):
            jobs.request_pause(job.name)
            job._pausing, _ = jobs.heartbeat(job.name, job.attempt)

    with monkeypatch.context() as patch:
        patch.setattr(JobContext, "report", pause)
        patch.setattr("toile.training.run.REPORT_INTERVAL_SECONDS", 0.0)
        row = train(train_and_publish)
    assert (row.state, row.attempt) == (JobState.PAUSED, 1)
    jobs.resume(row.name)
    assert execute(train_and_publish, settings, row.name, 2) == 0
    assert jobs.get(row.name).state == JobState.SUCCEEDED
    events, _ = jobs.events_after(row.name, 0)
    trained = [e for e in events if e.progress and e.progress["phase"] == "train"]
    resumed = next(e.sequence for e in events if e.state == "PAUSED")
    steps = [e.progress["step"] for e in trained if e.progress and e.sequence > resumed]
    assert steps == ([4] if where == "train" else []), "no step is done again"
    with catalog.reading() as session:
        again = session.get_one(ModelVersionRow, row.target)
    first, second = (
        load_lora(fetch(store, version.artifact, tmp_path / "fetched")).peft_state()
        for version in (whole, again)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_training_that_spends_its_budget_is_paused_and_goes_on_with_more(
    settings: Settings, catalog: Catalog, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = Prices(cpu_hour=1.0)
    settings = settings.model_copy(update={"prices": prices})
    monkeypatch.setattr(runtime, "HEARTBEAT_INTERVAL_SECONDS", 0.05)
    jobs, report = JobStore(catalog), JobContext.report

    def spend(job: JobContext, phase: str, step: int, *rest: int, **figures: float | str) -> None:
        """Let another process of the job have taken an hour by the second step."""
        report(job, phase, step, *rest, **figures)
        if phase == "train" and step == 2:
            jobs.heartbeat(job.name, job.attempt, Usage(cpu_seconds=3600), prices)
            deadline = time.monotonic() + 20
            while not job.stopping():
                assert time.monotonic() < deadline
                time.sleep(0.01)

    monkeypatch.setattr("toile.training.run.REPORT_INTERVAL_SECONDS", 0.0)
    request = request_of(steps=4, checkpoint_interval_steps=4, sample_prompts=["a lace dress"])
    request.budget = 1.0
    name = TrainHandler(settings, catalog, store).create(request).name
    jobs.next_attempt(name, after=0)
    with monkeypatch.context() as patch:
        patch.setattr(JobContext, "report", spend)
        assert execute(train_and_publish, settings, name, 1) == 0
    assert jobs.get(name).state == JobState.PAUSED
    with pytest.raises(FailedPreconditionError) as caught:
        jobs.resume(name, prices=prices)
    assert caught.value.reason == "BUDGET_SPENT"
    jobs.resume(name, budget=5.0, prices=prices)
    assert execute(train_and_publish, settings, name, 2) == 0
    assert jobs.get(name).state == JobState.SUCCEEDED
    events, _ = jobs.events_after(name, 0)
    told = [e.progress for e in events if e.progress and e.state == JobState.RUNNING]
    steps = [progress["step"] for progress in told if progress["phase"] == "train"]
    assert steps == [1, 2, 3, 4], "no step is done again"


def test_a_cancelled_training_keeps_no_checkpoint_of_its_end(
    train: Train, store: ArtifactStore, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = JobContext.report

    def cancel(job: JobContext, phase: str, step: int, *rest: int, **figures: float | str) -> None:
        report(job, phase, step, *rest, **figures)
        if phase == "train":
            JobStore(catalog).request_cancel(job.name)
            deadline = time.monotonic() + 20
            while not job.cancelled():
                assert time.monotonic() < deadline
                time.sleep(0.01)

    monkeypatch.setattr(JobContext, "report", cancel)
    row = train(train_and_publish)
    assert row.state == JobState.CANCELLED
    assert not list(store.list(f"{row.name}/checkpoints/"))


def test_a_version_keeps_what_tensorboard_shows(
    train: Train, settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    job = train(train_and_publish, validation_share=0.25, validation_interval_steps=3)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    figures = shown(folder / "tensorboard")
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert [step for step, _ in figures["learning_rate"]] == [1, 2, 3, 4]
    assert dict(figures["loss"]) == pytest.approx({e["step"]: e["loss"] for e in lines}, abs=1e-5)
    assert [step for step, _ in figures["validation_loss"]] == [3, 4]
    assert not list((settings.home_path / "tensorboard").iterdir())


def test_masks_and_repeats_reach_the_training(
    train: Train, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    """The masks and the names are those of the dataset version."""
    job = train(train_and_publish, masked_loss=True, repeats={"0.jpg": 3})
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    assert version.config["repeats"] == {"0.jpg": 3}
    facts = load_lora(fetch(store, version.artifact, tmp_path / "fetched")).header
    assert json.loads(facts["ss_dataset_dirs"]) == {
        "3_lace": {"n_repeats": 3, "img_count": 1},
        "lace": {"n_repeats": 1, "img_count": 3},
    }
    assert (facts["ss_num_train_images"], facts["ss_num_reg_images"]) == ("6", "0")
    assert facts["modelspec.prediction_type"] == "v"
    with_options = version.final_loss
    train(train_and_publish)
    with catalog.reading() as session:
        plain = session.get_one(ModelVersionRow, VERSION.replace("/1", "/2"))
    assert plain.final_loss != with_options


def test_a_lora_of_whole_transformers_is_packed_and_drawn_with(
    settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    wide = settings.model_copy(update={"engine": EngineSettings(targets="transformer")})
    request = request_of(
        target_modules="transformer", dropout=0.1, steps=2, sample_prompts=["a lace dress"]
    )
    row = TrainHandler(wide, catalog, store).create(request)
    jobs = JobStore(catalog)
    jobs.next_attempt(row.name, after=0)
    assert execute(train_and_publish, wide, row.name, 1) == 0
    ended, version = jobs.get(row.name), version_of(catalog)
    assert (ended.state, ended.error_message) == ("SUCCEEDED", "")
    assert version is not None
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    weights = load_lora(folder)
    assert any(path.endswith(".ff.net.0.proj") for path in weights.layers)
    with catalog.reading() as session:
        base = session.get_one(BaseRow, version.base).artifact
    layout = bank_layout(empty_unet(fetch(store, base, tmp_path / "fetched")), TRANSFORMER_TARGETS)
    (tmp_path / "packed").write_bytes(store.get(PackedFiles(store, layout).key(version.artifact)))
    packed = PackedAdapter.load(tmp_path / "packed", layout)
    assert packed.rank == 4
    assert all(array.any() for array in packed.arrays.values())

    models, drawn = Models(wide, store), []
    for adapters in ([], [inference_pb2.Adapter(artifact=version.artifact, weight=1.0)]):
        drawing = inference_pb2.DiffuseRequest(
            base_artifact=base, prompt="a dress", seeds=[1], steps=2, width=64, height=64
        )
        drawing.adapters.extend(adapters)
        models.diffuse(
            drawing,
            on_step=lambda *_: None,
            on_image=lambda _, data: drawn.append(data),
            on_preview=lambda *_: None,
            cancelled=lambda: False,
        )
    assert drawn[0] != drawn[1]


def test_a_dora_is_published_for_pytorch_alone(
    train: Train, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    ended = train(train_and_publish, use_dora=True, learning_rate=0.02)
    version = version_of(catalog)
    assert (ended.state, ended.error_message) == ("SUCCEEDED", "")
    assert version is not None
    assert version.reproduction_difference <= publish.REPRODUCTION_TOLERANCE_LEVELS
    assert version_message(VersionView(version, [])).config.use_dora
    assert load_lora(fetch(store, version.artifact, tmp_path / "fetched")).is_dora
    assert not [info for info in store.list("projects/p/models/") if ".bank/" in info.key]


def test_a_dora_whose_magnitudes_were_lost_is_not_published(
    train: Train, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = lora.Lora.export

    def spoilt(self: lora.Lora, folder: Path, card: AdapterCard) -> None:
        export(self, folder, card)
        weights = load_lora(folder)
        layers = {
            path: replace(layer, magnitude=2 * layer.magnitude)
            for path, layer in weights.layers.items()
            if layer.magnitude is not None
        }
        write_adapter(folder, AdapterWeights(layers), card)

    monkeypatch.setattr(lora.Lora, "export", spoilt)
    ended = train(train_and_publish, use_dora=True)
    assert (ended.state, ended.error_reason) == ("FAILED", "NOT_REPRODUCED")
    assert version_of(catalog) is None


def test_second_attempt_publishes_the_same_weights(
    train: Train, settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    train(train_and_publish)
    whole = version_of(catalog)
    assert whole is not None
    jobs = JobStore(catalog)

    def lost(job: JobContext) -> None:
        """Die when the closing samples are due."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publish, "draw_samples", _supersede)
            train_and_publish(job)

    def _supersede(job: JobContext, *_: object) -> None:
        jobs.next_attempt(job.name, after=1, message="compute was lost")
        job.report("sample", 0, 1)

    row = train(lost)
    assert (row.state, row.attempt) == (JobState.QUEUED, 2)
    assert execute(train_and_publish, settings, row.name, 2) == 0
    events, _ = jobs.events_after(row.name, 0)
    steps = [e.progress["step"] for e in events if e.progress and e.progress["phase"] == "train"]
    assert steps == sorted(steps), "steps that were checkpointed are not done again"
    with catalog.reading() as session:
        again = session.get_one(ModelVersionRow, row.target)
    for name in ("pytorch_lora_weights.safetensors", "loss.jsonl", "samples/00.png"):
        one = fetch(store, whole.artifact, tmp_path / "fetched") / name
        two = fetch(store, again.artifact, tmp_path / "fetched") / name
        if name.endswith("safetensors"):
            first, second = load_lora(one.parent).peft_state(), load_lora(two.parent).peft_state()
            assert all(torch.equal(first[key], second[key]) for key in first)
        else:
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("folder", "named", "rest"),
    [("", 4, ""), ("a" * 250 + "/", 2, "and 2 more, which the job's log")],
)
def test_a_loss_that_is_no_number_ends_the_job_with_its_step_and_images(
    train: Train,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    folder: str,
    named: int,
    rest: str,
) -> None:
    """However long their names are, the advice is whole."""

    def read(path: Path) -> list[Example]:
        return [replace(one, file_name=folder + one.file_name) for one in read_examples(path)]

    obtain = CacheMaker.obtain

    def poisoned(maker: CacheMaker, plan: CachePlan) -> dict[str, torch.Tensor]:
        tensors = obtain(maker, plan)
        return {**tensors, "means": torch.full_like(tensors["means"], float("nan"))}

    monkeypatch.setattr(run, "read_examples", read)
    monkeypatch.setattr(CacheMaker, "obtain", poisoned)
    job = train(train_and_publish, batch_size=8)
    assert (job.state, job.error_reason) == ("FAILED", "TRAINING_DIVERGED")
    assert "at step 1" in job.error_message
    assert "try a lower learning rate" in job.error_message
    images = [f"{folder}{index:06d}.png" for index in range(4)]
    assert sum(image in job.error_message for image in images) == named
    assert rest in job.error_message
    assert all(image in caplog.text for image in images)
    facts = job_message(job).error.metadata
    assert facts["step"] == "1"
    assert sorted(json.loads(facts["images"])) == images
    assert version_of(catalog) is None


def test_file_that_draws_something_else_is_not_published(
    train: Train, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = lora.write_lora

    def spoil(folder: Path, state: dict[str, torch.Tensor], *rest: object) -> list[Path]:
        return write(folder, {name: 30 * t for name, t in state.items()}, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(lora, "write_lora", spoil)
    job = train(train_and_publish)
    assert (job.state, job.error_reason) == ("FAILED", "NOT_REPRODUCED")
    assert version_of(catalog) is None


def times(factor: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        state = {name: factor * tensor for name, tensor in load_file(path).items()}
        save_file(state, path, metadata=facts)

    return spoil


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_each_file_that_is_spoilt_between_export_and_gate_is_named(
    train: Train, catalog: Catalog, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth more draws the same picture, so the layouts are compared as numbers."""
    verify = publish.verify
    found: list[tuple[str, float, str]] = []

    def spoilt(trained: publish.Trained, folder: Path, bank: Path, job: JobContext) -> float:
        (packed,) = bank.iterdir()
        for path, factor, spoil in [
            (folder / "kohya.safetensors", 1.001, times(1.001)),
            (folder / "pytorch_lora_weights.safetensors", 1.001, times(1.001)),
            (packed, 30, times(30)),
            (packed, 0, times(0)),
            (packed, 1, cut_off),
        ]:
            whole = path.read_bytes()
            spoil(path)
            with pytest.raises(ToileError) as caught:
                verify(trained, folder, bank, job)
            path.write_bytes(whole)
            assert path.name in caught.value.message
            found.append((path.parent.name, factor, caught.value.reason))
        return verify(trained, folder, bank, job)

    monkeypatch.setattr(publish, "verify", spoilt)
    job = train(train_and_publish, learning_rate=5e-2, mixed_precision="bf16")
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    assert found == [
        ("export-1", 1.001, "NOT_CONFORMANT"),
        ("export-1", 1.001, "NOT_CONFORMANT"),
        ("bank-1", 30, "NOT_REPRODUCED"),
        ("bank-1", 0, "NOT_REPRODUCED"),
        ("bank-1", 1, "NOT_CONFORMANT"),
    ]


@pytest.mark.parametrize("recipe", ["lora", "controlnet"])
def test_what_was_trained_makes_room_for_what_is_loaded_afresh(
    train: Train, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """On a GPU there may be no room for the UNet twice."""
    before = living()
    at_the_gate: list[object] = []
    load = Bundle.load

    def loaded(*args: object, **options: object) -> Bundle:
        others = {id(thing) for thing in before}
        at_the_gate.extend(type(thing) for thing in living() if id(thing) not in others)
        return load(*args, **options)  # type: ignore[arg-type]

    verify = publish.verify

    def watched(*args: object) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(Bundle, "load", loaded)
            return verify(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "verify", watched)
    job = train(train_and_publish, recipe)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    assert at_the_gate == []


def living() -> list[object]:
    """Optimizers, and networks whose weights are somewhere."""
    kinds = (torch.optim.Optimizer, ModelMixin, PreTrainedModel)
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]
    return [thing for thing in found if getattr(thing, "device", None) != torch.device("meta")]


def test_the_bank_is_there_before_the_version(
    train: Train, catalog: Catalog, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    real = type(store).put

    def recorded(self: ArtifactStore, key: str, *rest: object, **options: object) -> object:
        assert version_of(catalog) is None
        put.append(key)
        return real(self, key, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store), "put", recorded)
    train(train_and_publish)
    version = version_of(catalog)
    assert version is not None
    (packed,) = store.list(f"{version.artifact}.bank/")
    assert put.index(packed.key) < put.index(f"{version.artifact}/manifest.json")


TEXT = {"train_text_encoders": True, "text_encoder_learning_rate": 0.05, "learning_rate": 0.01}


def test_trained_text_encoders_are_published(
    train: Train, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    job = train(train_and_publish, sample_interval_steps=2, **TEXT)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    assert version.reproduction_difference <= publish.REPRODUCTION_TOLERANCE_LEVELS
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    weights = load_lora(folder)
    assert {path.partition(".")[0] for path in weights.text_layers} == {
        "text_encoder",
        "text_encoder_2",
    }
    assert all(layer.up.any() for layer in weights.text_layers.values())
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in load_file(
        folder / "kohya.safetensors"
    )
    # Each sample is of the encoders as they were then.
    samples = [folder / "samples" / step / "00.png" for step in ("step-000002", "step-000004")]
    assert samples[0].read_bytes() != samples[1].read_bytes()


def test_text_encoders_that_read_something_else_are_not_published(
    train: Train, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = lora.write_lora

    def spoil(folder: Path, state: dict[str, torch.Tensor], *rest: object) -> list[Path]:
        changed = {n: -9 * t if n.startswith("text") else t for n, t in state.items()}
        return write(folder, changed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(lora, "write_lora", spoil)
    job = train(train_and_publish, **TEXT)
    assert (job.state, job.error_reason) == ("FAILED", "NOT_REPRODUCED")
    assert version_of(catalog) is None


def test_cancelled_while_it_samples_publishes_nothing(
    train: Train, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JobStore(catalog)
    draw = publish.draw_samples

    def cancel_then_draw(job: JobContext, *rest: object) -> list[Image.Image]:
        jobs.request_cancel(job.name)
        return draw(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "draw_samples", cancel_then_draw)
    assert train(train_and_publish).state == JobState.CANCELLED
    assert version_of(catalog) is None


def test_long_captions_lose_their_end(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    fitted = caches.fit_caption(bundle, "<lace> " + "dress " * 200)
    assert bundle.count_tokens(fitted) <= CHUNK_TOKENS
    assert fitted.startswith("<lace> dress")
    assert caches.fit_caption(bundle, "<lace> dress") == "<lace> dress"
    assert caches.fit_caption(bundle, "x" * 500) == ""
