"""Fixtures of the integration tests."""

import os
from pathlib import Path
from typing import Any

import pytest

from integration.ray_head import ray_head

__all__ = ["ray_head"]


@pytest.fixture(scope="session")
def shipped_onnx(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny base's UNets as ONNX, exported once for all tests."""
    from integration.shipped_onnx import ShippedOnnx

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' have one folder around them
        folder = folder.parent
    return ShippedOnnx(folder / "shipped-onnx")


@pytest.fixture(scope="session")
def triton_environment() -> Any:
    """What holds the Triton server."""
    from toile.diffusion.triton.server import TritonEnvironment

    folder = Path(__file__).resolve().parents[2] / ".venv-triton"
    if not folder.is_dir():
        pytest.skip("there is no .venv-triton; `make triton` makes it")
    return TritonEnvironment.open(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("integration")
