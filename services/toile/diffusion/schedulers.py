"""Samplers by diffusers' class names, configured as the base was trained."""

from collections.abc import Mapping
from typing import Any

import diffusers

from toile.core.samplers import check_scheduler_name


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Return a fresh scheduler; it keeps a request's state, so requests never share one.

    Args:
        name: diffusers' class name; the class that the configuration names when empty.
        config: The base's scheduler configuration.

    Raises:
        InvalidArgumentError: The name is unknown (`UNKNOWN_SCHEDULER`).
    """
    chosen = check_scheduler_name(name) or str(config["_class_name"])
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return getattr(diffusers, chosen).from_config(settings)
