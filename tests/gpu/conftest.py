"""Tests that run engines: on a GPU, with a library that builds for it."""

import pytest
import torch

from toile.core.errors import ToileError
from toile.diffusion.engine_builders import EngineBuilder, open_builder
from toile.diffusion.tensorrt_library import builder_for, capability_here


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here, or torch is a CPU build")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def builder(device: torch.device) -> EngineBuilder:
    """Of TensorRT for RTX where it knows the GPU, of TensorRT elsewhere."""
    try:
        return open_builder(builder_for(capability_here()))
    except ToileError as error:
        pytest.skip(f"compute capability {capability_here()}: {error.message}")
