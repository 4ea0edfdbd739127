"""Fixtures of the integration tests."""

from integration.ray_head import ray_head

__all__ = ["ray_head"]
