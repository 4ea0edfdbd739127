"""What saves memory changes no result."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.training import batches
from toile.training.caches import Cache
from unit.training.runs import CONFIG, Run

WHOLE = CONFIG.model_copy(
    update={"batch_size": 6, "steps": 4, "learning_rate": 1e-4, "dropout": 0.3}
)


class Watched:
    """A run of a UNet that counts what it is given and how often its last block computes."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cache: Cache,
        scheduler: DDPMScheduler,
        **changes: object,
    ) -> None:
        self.images: list[int] = []
        self.block_runs = 0
        unet.register_forward_pre_hook(lambda _, inputs: self.images.append(len(inputs[0])))
        # The first blocks have no gradients, so there is nothing to compute again.
        unet.up_blocks[-1].resnets[0].register_forward_pre_hook(self._count)
        self.run = Run(unet, cache, scheduler, WHOLE.model_copy(update=changes))

    def _count(self, *_: object) -> None:
        self.block_runs += 1


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding of bf16 would differ with the number of images that are computed together."""
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)


@pytest.mark.parametrize(("pieces", "images"), [(2, [3, 3]), (4, [2, 2, 2]), (6, [1] * 6)])
def test_a_batch_in_pieces_trains_as_a_whole_one(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    pieces: int,
    images: list[int],
) -> None:
    whole = Watched(make_unet(), cache, scheduler)
    split = Watched(make_unet(), cache, scheduler, gradient_accumulation_steps=pieces)
    assert (whole.images, split.images) == ([6] * 4, images * 4)
    assert_alike(whole.run, split.run)


def test_activations_that_are_computed_again_are_the_same(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    kept = Watched(make_unet(), cache, scheduler)
    again = Watched(make_unet(), cache, scheduler, gradient_checkpointing=True)
    assert (kept.block_runs, again.block_runs) == (4, 8)
    assert_alike(kept.run, again.run)


def assert_alike(one: Run, two: Run) -> None:
    assert two.end.losses == pytest.approx(one.end.losses, abs=1e-6)
    for name, tensor in one.end.weights.items():
        torch.testing.assert_close(two.end.weights[name], tensor, atol=1e-6, rtol=0.0)
