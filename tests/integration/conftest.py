"""Fixtures of the integration tests."""

import pytest

from integration.ray_head import ray_head

__all__ = ["ray_head"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("integration")
