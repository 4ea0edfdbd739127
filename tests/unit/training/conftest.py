"""A network small enough to train in a test."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.diffusion.architecture import SCHEDULER_CONFIG, UNET_CONFIG
from toile.training.caches import Cache

EXAMPLES = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_unet() -> Callable[[], UNet2DConditionModel]:
    """The same small UNet of the tiny base's kind, again and again."""
    config = {
        **UNET_CONFIG,
        "block_out_channels": (16, 16, 32),
        "attention_head_dim": (2, 2, 2),
        "layers_per_block": 1,
    }

    def make() -> UNet2DConditionModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return UNet2DConditionModel(**config)

    return make


@pytest.fixture
def cache() -> Cache:
    """Encoded examples, made up."""
    source = torch.Generator().manual_seed(0)
    return Cache(
        means=torch.randn(EXAMPLES, 4, 16, 16, generator=source),
        deviations=torch.full((EXAMPLES, 4, 16, 16), 0.01),
        captions=torch.tensor([1, 2, 1, 2]),
        embeds=torch.randn(3, 77, UNET_CONFIG["cross_attention_dim"], generator=source),
        pooled=torch.randn(3, 128, generator=source),
    )


@pytest.fixture
def scheduler() -> DDPMScheduler:
    config = {k: v for k, v in SCHEDULER_CONFIG.items() if k != "timestep_spacing"}
    return DDPMScheduler(**config)
