"""A network small enough to train in a test."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.training.caches import Cache
from unit.training import runs


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_unet() -> Callable[[], UNet2DConditionModel]:
    """The same small UNet of the tiny base's kind, again and again."""
    return runs.small_unet


@pytest.fixture
def cache() -> Cache:
    """Encoded examples, made up."""
    return runs.made_up_cache()


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return runs.base_scheduler()
