"""The moving average, against diffusers' own, and where it goes."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from toile.training import lora
from toile.training.caches import Cache
from toile.training.ema import MovingAverage, replaced
from unit.training.runs import CONFIG, Run


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_is_that_of_diffusers(decay: float) -> None:
    parameter = nn.Parameter(torch.zeros(5))
    mine, theirs = MovingAverage({"w": parameter}, decay), EMAModel([parameter], decay=decay)
    source = torch.Generator().manual_seed(0)
    for step in range(30):
        parameter.data += torch.randn(5, generator=source)
        mine.update(step)
        theirs.step([parameter])
    torch.testing.assert_close(mine.weights["w"], theirs.shadow_params[0])
    assert not torch.allclose(mine.weights["w"], parameter)


def test_replaced_weights_come_back_though_the_block_fails() -> None:
    parameter = nn.Parameter(torch.tensor([0.1, 0.2]))

    def fail() -> None:
        with replaced({"w": parameter}, {"w": torch.zeros(2)}):
            assert not parameter.any()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(parameter, torch.tensor([0.1, 0.2]))


def test_the_average_is_published_and_the_weights_are_trained_on(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    plain = Run(make_unet(), cache, scheduler)
    averaged = Run(make_unet(), cache, scheduler, CONFIG.model_copy(update={"ema_decay": 0.9}))
    assert averaged.end.losses == plain.end.losses
    for name, tensor in plain.end.weights.items():
        assert torch.equal(averaged.end.weights[name], tensor)
    state = dict(averaged.unet.named_parameters())
    assert averaged.end.average
    for name, tensor in averaged.end.average.items():
        assert torch.equal(state[name], tensor)
    mine, theirs = lora.adapter_state(averaged.unet), lora.adapter_state(plain.unet)
    assert not any(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_without_one_keeps_none(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    assert not Run(make_unet(), cache, scheduler).end.average
