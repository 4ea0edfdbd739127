"""Stands in for ONNX Runtime in Triton's Python: an engine that takes a GPU's time and no work.

The "model" is a JSON file with a batch's cost.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np


class SessionOptions:
    """Takes every option."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Take one more."""


class InferenceSession:
    """Sleeps `base_ms + sample_ms * batch`, and predicts zeros."""

    def __init__(self, path: str | Path, *_: Any, **__: Any) -> None:
        curve = json.loads(Path(path).read_text(encoding="utf-8"))
        self._base_seconds = curve["base_ms"] / 1e3
        self._sample_seconds = curve["sample_ms"] / 1e3

    def run(self, _: Any, inputs: dict[str, Any]) -> list[Any]:
        """Answer as the engine would, as late as a GPU would."""
        sample = inputs["sample"]
        time.sleep(self._base_seconds + self._sample_seconds * len(sample))
        return [np.zeros(sample.shape, np.float32)]
