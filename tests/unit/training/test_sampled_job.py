"""Samples that a training draws on its way, from its job to the published version."""

import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toile.core.artifacts import ArtifactStore, fetch
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow, ModelVersionRow
from toile.core.jobs import JobState, JobStore
from toile.core.jobs.runtime import JobContext, execute
from toile.core.settings import Settings
from toile.diffusion.adapters import load_lora
from toile.training import sampling
from toile.training.judging import best_judged
from toile.training.run import train_and_publish

pytestmark = pytest.mark.usefixtures("quick_samples", "every_step_is_told")
Train = Callable[..., JobRow]
Open = Callable[[JobRow], Path]
Report = Callable[..., None]

report: Report = JobContext.report


@pytest.fixture
def every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toile.training.run.REPORT_INTERVAL_SECONDS", 0.0)


@pytest.fixture
def version_of(catalog: Catalog, store: ArtifactStore, tmp_path: Path) -> Open:
    """The folder of the version that a job made."""

    def version_of(job: JobRow) -> Path:
        assert (job.state, job.error_message) == ("SUCCEEDED", "")
        with catalog.reading() as session:
            artifact = session.get_one(ModelVersionRow, job.target).artifact
        return fetch(store, artifact, tmp_path / "fetched")

    return version_of


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[JobContext]:
    """One entry for each sample that is drawn on the way."""
    made: list[JobContext] = []
    draw = sampling.draw_sample

    def counted(job: JobContext, *rest: Any) -> Image.Image:
        made.append(job)
        return draw(job, *rest)

    monkeypatch.setattr(sampling, "draw_sample", counted)
    return made


def sampled_steps(folder: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (folder / "samples").glob("step-*")
    )


def told(catalog: Catalog, job: JobRow, figure: str) -> list[Any]:
    events, _ = JobStore(catalog).events_after(job.name, 0)
    return [e.progress[figure] for e in events if e.progress and figure in e.progress]


def shown_images(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return [event.step for event in events.Images("samples/00")]


def same_adapters(one: Path, other: Path) -> bool:
    first, second = load_lora(one).peft_state(), load_lora(other).peft_state()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_version_has_the_samples_of_its_training(
    train: Train, version_of: Open, catalog: Catalog, store: ArtifactStore
) -> None:
    prompts = ["a lace dress", "a lace skirt"]
    job = train(
        train_and_publish,
        sample_interval_steps=2,
        sample_prompts=prompts,
        seed=5,
        mixed_precision="no",  # as the closing samples are drawn
    )
    folder = version_of(job)
    assert sampled_steps(folder) == told(catalog, job, "samples_step") == [2, 4]
    facts = json.loads((folder / "samples/step-000002/samples.json").read_text())
    assert [(one["prompt"], one["seed"]) for one in facts["samples"]] == [
        (prompts[0], 5),
        (prompts[1], 6),
    ]
    closing = (folder / "samples/01.png").read_bytes()
    assert pixels((folder / "samples/step-000004/01.png").read_bytes()).equal(pixels(closing))
    assert not pixels((folder / "samples/step-000002/01.png").read_bytes()).equal(pixels(closing))
    assert shown_images(folder) == [2, 4]
    assert not list(store.list(f"{job.name}/samples/"))


def pixels(png: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB")))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_drawing_them_changes_nothing(train: Train, version_of: Open, ema_decay: float) -> None:
    without = version_of(train(train_and_publish, ema_decay=ema_decay))
    sampled = version_of(train(train_and_publish, ema_decay=ema_decay, sample_interval_steps=1))
    assert same_adapters(without, sampled)
    assert (without / "loss.jsonl").read_bytes() == (sampled / "loss.jsonl").read_bytes()


def test_what_was_kept_is_not_drawn_again(
    train: Train,
    settings: Settings,
    catalog: Catalog,
    version_of: Open,
    drawings: list[JobContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process is lost after step 5; its checkpoint is of step 3, its samples of step 4 too."""
    changes = {"steps": 6, "checkpoint_interval_steps": 3, "sample_interval_steps": 2}
    whole = version_of(train(train_and_publish, **changes))
    drawings.clear()
    jobs = JobStore(catalog)

    def lose(job: JobContext, phase: str, step: int, *rest: int, **figures: Any) -> None:
        if phase == "train" and step == 5:
            jobs.next_attempt(job.name, after=1, message="compute was lost")
        report(job, phase, step, *rest, **figures)

    with monkeypatch.context() as patch:
        patch.setattr(JobContext, "report", lose)
        row = train(train_and_publish, **changes)
    assert (row.state, row.attempt) == (JobState.QUEUED, 2)
    assert execute(train_and_publish, settings, row.name, 2) == 0
    again = version_of(jobs.get(row.name))
    assert [job.attempt for job in drawings] == [1, 1, 2]
    assert sampled_steps(again) == [2, 4, 6]
    assert set(shown_images(again)) == {2, 4, 6}
    assert same_adapters(whole, again)


def test_a_pause_while_they_are_drawn_changes_nothing(
    train: Train,
    settings: Settings,
    catalog: Catalog,
    version_of: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {
        "steps": 5,
        "checkpoint_interval_steps": 9,
        "sample_interval_steps": 2,
        "publish_weights": "best_samples",
    }
    whole = version_of(train(train_and_publish, **changes))
    jobs = JobStore(catalog)
    draw = sampling.draw_sample

    def pause(job: JobContext, *rest: Any) -> Image.Image:
        if told(catalog, jobs.get(job.name), "samples_step"):  # of step 2; so these are of step 4
            jobs.request_pause(job.name)
            job._pausing, _ = jobs.heartbeat(job.name, job.attempt)
        return draw(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "draw_sample", pause)
        row = train(train_and_publish, **changes)
    assert row.state == JobState.PAUSED
    assert told(catalog, row, "samples_step") == [2]
    jobs.resume(row.name)
    assert execute(train_and_publish, settings, row.name, 2) == 0
    again = version_of(jobs.get(row.name))
    assert sampled_steps(again) == [2, 4, 5]
    assert same_adapters(whole, again)
    assert (whole / "loss.jsonl").read_bytes() == (again / "loss.jsonl").read_bytes()


def test_somebody_who_asks_is_shown_where_the_training_is(
    train: Train, catalog: Catalog, version_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JobStore(catalog)

    def ask(job: JobContext, phase: str, step: int, *rest: int, **figures: Any) -> None:
        report(job, phase, step, *rest, **figures)
        if phase == "train" and step == 2 and not figures.keys() & {"samples_step", "message"}:
            jobs.request_samples(job.name)
            deadline = time.monotonic() + 20
            while not job.samples_wanted():  # the heartbeat learns of it
                assert time.monotonic() < deadline
                time.sleep(0.01)

    monkeypatch.setattr(JobContext, "report", ask)
    job = train(train_and_publish)
    assert told(catalog, job, "samples_step") == [2]
    assert sampled_steps(version_of(job)) == [2]


def test_the_best_samples_choose_what_is_published(
    train: Train, catalog: Catalog, version_of: Open
) -> None:
    job = train(
        train_and_publish,
        steps=3,
        learning_rate=0.02,
        sample_interval_steps=1,
        publish_weights="best_samples",
        sample_prompts=["<lace> a red dress"],
        mixed_precision="no",  # as the closing samples are drawn
    )
    folder = version_of(job)
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    scores: dict[int, list[Mapping[str, float | None]]] = {}
    for step in (1, 2, 3):
        facts = json.loads((folder / f"samples/step-{step:06d}/samples.json").read_text())
        scores[step] = [one["scores"] for one in facts["samples"]]
        assert lines[step - 1]["sample_scores"] == {
            name: score for name, score in scores[step][0].items() if score is not None
        }
    best = best_judged(scores)
    assert [line["step"] for line in lines if line.get("published")] == [best]
    assert told(catalog, job, "best_samples_step")[-1] == best
    assert told(catalog, job, "sample_scores")[best - 1] == lines[best - 1]["sample_scores"]
    closing = pixels((folder / "samples/00.png").read_bytes())
    for step in (1, 2, 3):
        drawn = pixels((folder / f"samples/step-{step:06d}/00.png").read_bytes())
        assert drawn.equal(closing) == (step == best)


def test_a_controlnets_samples_are_drawn_under_its_maps(train: Train, version_of: Open) -> None:
    folder = version_of(train(train_and_publish, "controlnet", sample_interval_steps=2))
    assert sampled_steps(folder) == [2, 4]
