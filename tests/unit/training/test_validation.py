"""Held-out images: who they are, what is said of them, and what follows."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.core.errors import FailedPreconditionError, ToileError
from toile.training import batches, lora
from toile.training.buckets import one_bucket
from toile.training.caches import Cache
from toile.training.checks import hold_out, sample_order
from toile.training.validation import (
    Validation,
    best_step,
    is_exhausted,
)
from unit.training.runs import CONFIG, NAMES, Run

VALIDATED = CONFIG.model_copy(
    update={"validation_share": 0.25, "validation_interval_steps": 2, "steps": 5}
)
CPU = torch.device("cpu")
MakeUnet = Callable[[], UNet2DConditionModel]


def test_samples_are_of_what_is_held_out_first() -> None:
    training, held_out = hold_out(NAMES, 0.25)
    assert sample_order(NAMES, 0.25, recipe="controlnet") == [*held_out, *training]
    assert sample_order(NAMES, 0.0, recipe="controlnet") == list(range(len(NAMES)))


def test_the_same_names_are_held_out_in_every_order() -> None:
    names = [f"images/{n:06d}.png" for n in range(40)]
    training, held_out = hold_out(names, 0.1)
    assert sorted(training + held_out) == list(range(40))
    assert len(held_out) == 4
    assert held_out != [36, 37, 38, 39]
    backwards = names[::-1]
    assert {names[i] for i in held_out} == {backwards[i] for i in hold_out(backwards, 0.1)[1]}


def test_a_larger_share_holds_out_those_of_a_smaller_one_too() -> None:
    names = [f"{n}.png" for n in range(40)]
    assert set(hold_out(names, 0.1)[1]) < set(hold_out(names, 0.3)[1])


def test_nobody_or_somebody() -> None:
    assert hold_out(NAMES, 0.0) == ([0, 1, 2, 3], [])
    assert len(hold_out(NAMES, 0.01)[1]) == 1


def test_one_image_cannot_be_shared_out() -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        hold_out(["a.png"], 0.5)
    assert caught.value.reason == "DATASET_TOO_SMALL"
    assert caught.value.metadata["field"] == "lora.validation_share"


def test_nothing_is_learned_from_those_held_out(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler
) -> None:
    (held_out,) = hold_out(NAMES, VALIDATED.validation_share)[1]
    other = dataclasses.replace(cache, means=cache.means.clone())
    other.means[held_out] += 3.0
    one, two = (Run(make_unet(), c, scheduler, VALIDATED) for c in (cache, other))
    assert one.end.losses == two.end.losses
    assert all(torch.equal(t, two.end.weights[name]) for name, t in one.end.weights.items())
    assert one.end.validations != two.end.validations


def test_every_validation_draws_the_same(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler
) -> None:
    unet = make_unet()
    config = VALIDATED.model_copy(update={"noise_offset": 0.5, "caption_dropout": 1.0})
    losses = {
        Validation(one_bucket(cache, 128), [0, 3], scheduler, config).loss(
            unet, torch.device("cpu")
        ),
        Validation(one_bucket(cache, 128), [0, 3], scheduler, VALIDATED).loss(
            unet, torch.device("cpu")
        ),
    }
    assert len(losses) == 1, "neither captions are dropped nor noise is offset"


def test_the_loss_is_the_mean_over_images_and_timesteps(
    make_unet: MakeUnet,
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)
    seen: list[list[int]] = []
    unet = make_unet()
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
    both = Validation(one_bucket(cache, 128), [0, 3], scheduler, VALIDATED).loss(
        unet, torch.device("cpu")
    )
    assert [step for steps in seen for step in steps] == [125, 375, 625, 875] * 2
    assert {len(timesteps) for timesteps in seen} == {VALIDATED.batch_size}
    single = [
        Validation(one_bucket(cache, 128), [i], scheduler, VALIDATED).loss(
            unet, torch.device("cpu")
        )
        for i in (0, 3)
    ]
    assert both == pytest.approx(sum(single) / 2, abs=1e-6)


def test_validations_are_reported_after_the_interval_and_at_the_end(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler
) -> None:
    run = Run(make_unet(), cache, scheduler, VALIDATED)
    reported = {r.step: r.validation_loss for r in run.reports if r.validation_loss is not None}
    assert list(reported) == [2, 4, 5]
    assert reported == run.end.validations


def test_the_best_weights_are_published_and_training_goes_on_from_its_own(
    make_unet: MakeUnet,
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    run = Run(make_unet(), cache, scheduler, VALIDATED)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(Validation, "loss", lambda *_: 1.0)
    plain = Run(
        make_unet(),
        cache,
        scheduler,
        VALIDATED.model_copy(update={"checkpoint_interval_steps": 4}),
        keep=lambda point: kept.update({point.step: dict(point.weights)}),
    )
    parameters = dict(run.unet.named_parameters())
    for name, tensor in kept[4].items():
        assert torch.equal(parameters[name], tensor), "step 4 had the lowest loss"
        assert torch.equal(run.end.weights[name], plain.end.weights[name])
        assert torch.equal(run.end.best[name], tensor)


def test_patience_ends_a_run_and_it_stays_ended(
    make_unet: MakeUnet,
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([0.1, 0.2, 0.3, 0.4, 0.5])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    config = VALIDATED.model_copy(
        update={"steps": 50, "validation_interval_steps": 1, "early_stopping_patience": 2}
    )
    run = Run(make_unet(), cache, scheduler, config)
    assert (run.end.step, len(run.end.losses)) == (3, 3)
    again = Run(make_unet(), cache, scheduler, config, start=run.end)
    assert not again.reports
    mine, theirs = lora.adapter_state(run.unet), lora.adapter_state(again.unet)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("losses", "patience", "ended"),
    [
        ({}, 1, False),
        ({10: 0.5}, 1, False),
        ({10: 0.5, 20: 0.5}, 1, True),
        ({10: 0.5, 20: 0.6, 30: 0.4}, 2, False),
        ({10: 0.4, 20: 0.6, 30: 0.5}, 2, True),
        ({10: 0.4, 20: 0.6, 30: 0.5}, 0, False),
    ],
)
def test_patience(losses: dict[int, float], patience: int, ended: bool) -> None:
    assert is_exhausted(losses, patience) is ended


def test_the_first_of_the_best_is_the_best() -> None:
    assert best_step({10: 0.5, 20: 0.4, 30: 0.4}) == 20
    assert best_step({}) == 0


def test_a_validation_that_is_no_number_ends_the_run(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler
) -> None:
    (held_out,) = hold_out(NAMES, VALIDATED.validation_share)[1]
    cache.means[held_out] = float("nan")
    with pytest.raises(ToileError) as caught:
        Run(make_unet(), cache, scheduler, VALIDATED)
    assert caught.value.reason == "TRAINING_DIVERGED"
    assert NAMES[held_out] in caught.value.message
