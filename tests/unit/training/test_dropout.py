"""Dropout is of the images, wherever they are computed."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.training import batches
from toile.training.caches import Cache
from toile.training.dropout import ImageDropout
from unit.training.runs import CONFIG, Run

SHARE = 0.25


def dropout(step: int = 3, *places: int, seed: int = 1, layer: int = 0) -> ImageDropout:
    made = ImageDropout(SHARE, seed=seed, layer=layer)
    made.step, made.places = step, places
    return made


def test_a_share_is_zeroed_and_the_rest_makes_up_for_it() -> None:
    ones = torch.ones(2, 100, 100)
    out = dropout(3, 0, 1)(ones)
    assert float((out == 0).float().mean()) == pytest.approx(SHARE, abs=0.01)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - SHARE)])


def test_a_mask_is_its_images_own() -> None:
    ones = torch.ones(4, 8, 8)
    whole = dropout(3, 0, 1, 2, 3)(ones)
    odd = dropout(3, 1, 3)(ones[:2])
    assert torch.equal(odd, whole[[1, 3]])
    assert not torch.equal(whole[0], whole[1])


def test_steps_layers_and_seeds_have_masks_of_their_own() -> None:
    ones = torch.ones(1, 8, 8)
    masks = [
        dropout(3, 0),
        dropout(4, 0),
        dropout(3, 1),
        dropout(3, 0, layer=1),
        dropout(3, 0, seed=2),
    ]
    drawn = {tuple(mask(ones).flatten().tolist()) for mask in masks}
    assert len(drawn) == len(masks)


def test_gradients_go_where_the_numbers_went() -> None:
    ones = torch.ones(1, 8, 8, requires_grad=True)
    out = dropout(3, 0)(ones)
    out.sum().backward()
    assert ones.grad is not None
    assert torch.equal(ones.grad, out.detach())


def test_nothing_is_dropped_but_in_training() -> None:
    numbers = torch.randn(2, 8, 8)
    assert torch.equal(dropout().eval()(numbers), numbers)


def test_each_image_needs_a_place() -> None:
    with pytest.raises(ValueError, match="longer"):
        dropout(3, 0)(torch.ones(2, 8))


def test_a_run_drops_anew_in_each_step_and_validates_without(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)
    drawn: list[tuple[int, tuple[int, ...], bool]] = []
    forward = ImageDropout.forward

    def watch(self: ImageDropout, hidden: torch.Tensor) -> torch.Tensor:
        drawn.append((self.step, tuple(self.places), self.training))
        return forward(self, hidden)

    monkeypatch.setattr(ImageDropout, "forward", watch)
    config = CONFIG.model_copy(
        update={
            "dropout": SHARE,
            "steps": 2,
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "validation_share": 0.25,
            "validation_interval_steps": 1,
        }
    )
    Run(make_unet(), cache, scheduler, config)
    trained = {(step, places) for step, places, training in drawn if training}
    assert trained == {(0, (0, 1)), (0, (2,)), (1, (0, 1)), (1, (2,))}
    assert any(not training for _, _, training in drawn), "it was validated"


def test_dropout_changes_what_is_learned(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    plain = Run(make_unet(), cache, scheduler)
    dropped = Run(make_unet(), cache, scheduler, CONFIG.model_copy(update={"dropout": SHARE}))
    # The first step's update is zero, whatever it is given.
    assert dropped.end.losses[0] == plain.end.losses[0]
    assert dropped.end.losses[2:] != plain.end.losses[2:]
