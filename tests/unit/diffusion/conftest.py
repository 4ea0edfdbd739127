"""One random base for all tests of the diffusion package."""

from pathlib import Path

import pytest
import torch

from toile.diffusion.adapters import AdapterWeights, LoraLayer, linear_targets
from toile.diffusion.bundle import Bundle

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle, digest="d" * 64)


@pytest.fixture
def lora(bundle: Bundle) -> AdapterWeights:
    """A strong adapter of rank 4 and alpha 2 on all attention."""
    return _make_lora(bundle, seed=0)


@pytest.fixture
def other_lora(bundle: Bundle) -> AdapterWeights:
    """Another one, of rank 2 and alpha 4."""
    return _make_lora(bundle, seed=1, rank=2, alpha=4.0)


def _make_lora(bundle: Bundle, *, seed: int, rank: int = 4, alpha: float = 2.0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            path: LoraLayer(
                0.3 * torch.randn(rank, inputs, generator=generator),
                0.3 * torch.randn(outputs, rank, generator=generator),
                alpha,
            )
            for path, (inputs, outputs) in linear_targets(bundle.unet).items()
            if path.endswith(ATTENTION)
        }
    )
