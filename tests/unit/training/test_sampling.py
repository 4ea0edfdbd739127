"""Samples between the steps of a run: when, with which weights, and what they decide."""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from toile.core.errors import CancelledError
from toile.core.jobs.samples import Sample, SampleSet
from toile.training import lora
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint
from toile.training.state import published_step
from toile.training.validation import Validation
from unit.training.runs import CONFIG, Run
from unit.training.test_exact_resume import written_and_read

STEPS = 6
SAMPLED = CONFIG.model_copy(update={"sample_interval_steps": 2})
JUDGED = SAMPLED.model_copy(update={"publish_weights": "best_samples"})
STYLE = {2: 0.5, 4: 0.9, 6: 0.7}
"""Score of the samples of each step: those of step 4 are the best."""


class Easel:
    """Draws nothing, but sees the weights that there are to draw with."""

    def __init__(
        self, unet: UNet2DConditionModel, scores: Mapping[int, float] | None = None
    ) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.modes: set[bool] = set()
        self.told: list[tuple[int, int]] = []
        self.asked = False
        self.fails_at = 0
        self.failed = False
        self.unet = unet
        self._scores = scores

    def wanted(self) -> bool:
        return self.asked

    def draw(self, step: int, *, due: bool) -> Generator[None, None, SampleSet | None]:
        yield
        if step == self.fails_at:
            self.failed = True
            return None
        assert step not in self.seen
        self.seen[step] = {n: t.clone() for n, t in lora.adapter_state(self.unet).items()}
        self.modes.add(self.unet.training)
        judged = due and self._scores is not None
        return SampleSet(step, [Sample("a", 0, {"style": self._scores[step]} if judged else {})])

    def tell(self, drawn: SampleSet, best_step: int) -> None:
        self.told.append((drawn.step, best_step))
        self.asked = False


@pytest.fixture
def easel(make_unet: Callable[[], UNet2DConditionModel]) -> Easel:
    return Easel(make_unet())


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_samples_are_drawn_at_their_interval_and_after_the_last_step(
    easel: Easel, cache: Cache, scheduler: DDPMScheduler
) -> None:
    config = CONFIG.model_copy(update={"sample_interval_steps": 4})
    Run(easel.unet, cache, scheduler, config, samples=easel)
    assert easel.told == [(4, 0), (6, 0)]
    assert easel.modes == {False}, "networks that draw do not train"


def test_they_change_nothing(
    easel: Easel,
    cache: Cache,
    scheduler: DDPMScheduler,
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    without = Run(make_unet(), cache, scheduler, CONFIG)
    sampled = Run(easel.unet, cache, scheduler, SAMPLED, samples=easel)
    assert without.end.to_files() == sampled.end.to_files()
    assert equal(lora.adapter_state(without.unet), lora.adapter_state(sampled.unet))


def test_they_are_drawn_with_the_average_if_one_is_kept(
    easel: Easel, cache: Cache, scheduler: DDPMScheduler
) -> None:
    config = SAMPLED.model_copy(update={"ema_decay": 0.9, "checkpoint_interval_steps": 4})
    kept: list[Checkpoint] = []
    run = Run(easel.unet, cache, scheduler, config, samples=easel, keep=kept.append)
    averages = sorted(kept[0].average.items())
    seen = sorted(easel.seen[4].items())
    assert [tensor.shape for _, tensor in averages] == [tensor.shape for _, tensor in seen]
    assert all(torch.equal(a, s) for (_, a), (_, s) in zip(averages, seen, strict=True))
    assert not equal(easel.seen[4], easel.seen[6])
    assert equal(easel.seen[6], lora.adapter_state(run.unet))


def test_somebody_who_asks_gets_those_of_the_current_step(
    easel: Easel, cache: Cache, scheduler: DDPMScheduler
) -> None:
    easel.asked = True  # before the first step, after which there is something to see
    Run(easel.unet, cache, scheduler, CONFIG, samples=easel)
    assert easel.told == [(1, 0)]


def test_the_weights_of_the_best_samples_are_published(
    cache: Cache, scheduler: DDPMScheduler, make_unet: Callable[[], UNet2DConditionModel]
) -> None:
    easel = Easel(make_unet(), STYLE)
    run = Run(easel.unet, cache, scheduler, JUDGED, samples=easel)
    assert easel.told == [(2, 2), (4, 4), (6, 4)]
    assert published_step(run.end, JUDGED) == 4
    assert equal(easel.seen[4], lora.adapter_state(run.unet))
    assert not equal(easel.seen[4], easel.seen[6])


def test_what_was_asked_for_has_no_say_in_it(
    cache: Cache, scheduler: DDPMScheduler, make_unet: Callable[[], UNet2DConditionModel]
) -> None:
    easel = Easel(make_unet(), STYLE)
    easel.asked = True
    run = Run(easel.unet, cache, scheduler, JUDGED, samples=easel)
    assert easel.told[0] == (1, 0)
    assert list(run.end.judgements) == [2, 4, 6]


@pytest.mark.parametrize(
    ("publish_weights", "validation_share", "step"),
    [("best_validation", 0.25, 4), ("best_validation", 0.0, 6), ("last", 0.25, 6)],
)
def test_what_else_can_be_published(
    easel: Easel,
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
    publish_weights: str,
    validation_share: float,
    step: int,
) -> None:
    losses = iter([0.6, 0.5, 0.4, 0.3, 0.4, 0.5])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    config = CONFIG.model_copy(
        update={
            "sample_interval_steps": 1,
            "validation_interval_steps": 1,
            "validation_share": validation_share,
            "publish_weights": publish_weights,
        }
    )
    run = Run(easel.unet, cache, scheduler, config, samples=easel)
    assert published_step(run.end, config) == step
    assert equal(easel.seen[step], lora.adapter_state(run.unet))


def test_a_run_that_ends_early_is_judged_by_its_end_too(
    cache: Cache,
    scheduler: DDPMScheduler,
    make_unet: Callable[[], UNet2DConditionModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    config = JUDGED.model_copy(
        update={
            "validation_share": 0.25,
            "validation_interval_steps": 1,
            "early_stopping_patience": 2,
        }
    )
    easel = Easel(make_unet(), {2: 0.5, 3: 0.9})
    run = Run(easel.unet, cache, scheduler, config, samples=easel)
    assert run.end.step == 3
    assert easel.told == [(2, 2), (3, 3)]
    assert equal(easel.seen[3], lora.adapter_state(run.unet))


@pytest.mark.parametrize("drawing", [False, True])
def test_an_interruption_changes_nothing(
    cache: Cache,
    scheduler: DDPMScheduler,
    make_unet: Callable[[], UNet2DConditionModel],
    tmp_path: Path,
    drawing: bool,
) -> None:
    """After step 3, or while the samples of step 4 are drawn, which the next attempt draws."""
    whole, first, second = (Easel(make_unet(), STYLE) for _ in range(3))
    uninterrupted = Run(whole.unet, cache, scheduler, JUDGED, samples=whole)
    first.fails_at = 4
    kept: list[Checkpoint] = []
    with pytest.raises(CancelledError):
        Run(
            first.unet,
            cache,
            scheduler,
            JUDGED,
            samples=first,
            keep=kept.append,
            stop_at=-1 if drawing else 3,
            stopping=lambda: first.failed,
        )
    assert kept[-1].step == (4 if drawing else 3)
    start = written_and_read(kept[-1], tmp_path)
    resumed = Run(second.unet, cache, scheduler, JUDGED, start, samples=second)
    assert list(second.seen) == [4, 6]
    assert uninterrupted.end.to_files() == resumed.end.to_files()
    assert equal(lora.adapter_state(uninterrupted.unet), lora.adapter_state(resumed.unet))


def test_an_interruption_of_the_last_samples_changes_nothing(
    cache: Cache, scheduler: DDPMScheduler, make_unet: Callable[[], UNet2DConditionModel]
) -> None:
    whole, first, second = (Easel(make_unet(), STYLE) for _ in range(3))
    uninterrupted = Run(whole.unet, cache, scheduler, JUDGED, samples=whole)
    first.fails_at = STEPS
    end = Run(
        first.unet, cache, scheduler, JUDGED, samples=first, stopping=lambda: first.failed
    ).end
    assert (end.step, list(end.judgements)) == (STEPS, [2, 4])
    resumed = Run(second.unet, cache, scheduler, JUDGED, end, samples=second)
    assert (list(second.seen), resumed.reports) == ([STEPS], [])
    assert uninterrupted.end.to_files() == resumed.end.to_files()
