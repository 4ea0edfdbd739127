"""Servers that people build with diffusers for many LoRAs: one pipeline, one request at a time.

In their favour: prompts come encoded, and images are decoded outside of the lock.
"""

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionXLPipeline
from serve.drawing import latents_by

from toile.diffusion.adapters import DIFFUSERS_FILE
from toile.diffusion.bundle import Bundle


class Peer(Protocol):
    """Draws latents with one of its adapters."""

    def draw(self, adapter: int, *, steps: int, seed: int) -> torch.Tensor:
        """Draw latents `[1, 4, h, w]`, when it is the caller's turn."""
        ...


class SettingServer:
    """All adapters are loaded beforehand; a request chooses its own by `set_adapters`."""

    def __init__(self, bundle: Bundle, folders: Sequence[Path], dtype: torch.dtype) -> None:
        self._bundle, self._lock = bundle, threading.Lock()
        self._pipeline = _own_pipeline(bundle, dtype)
        for number, folder in enumerate(folders):
            _load(self._pipeline, folder, f"a{number}")
        self._pipeline.unet.to(dtype)  # the adapters, too: their files are fp32

    def draw(self, adapter: int, *, steps: int, seed: int) -> torch.Tensor:
        """See `Peer`."""
        with self._lock:
            self._pipeline.set_adapters(f"a{adapter}")
            return _draw(self._bundle, self._pipeline, steps, seed)


class FusingServer:
    """A request loads its adapter and fuses it into the weights; then they are restored."""

    def __init__(self, bundle: Bundle, folders: Sequence[Path], dtype: torch.dtype) -> None:
        self._bundle, self._lock = bundle, threading.Lock()
        self._pipeline, self._folders = _own_pipeline(bundle, dtype), folders

    def draw(self, adapter: int, *, steps: int, seed: int) -> torch.Tensor:
        """See `Peer`."""
        with self._lock:
            _load(self._pipeline, self._folders[adapter], "a")
            self._pipeline.fuse_lora()
            try:
                return _draw(self._bundle, self._pipeline, steps, seed)
            finally:
                self._pipeline.unfuse_lora()
                self._pipeline.unload_lora_weights()


def _own_pipeline(bundle: Bundle, dtype: torch.dtype) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle.path, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(pipeline: Any, folder: Path, name: str) -> None:
    with warnings.catch_warnings():
        # peft warns of several adapters in one model, which is what is wanted.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        pipeline.load_lora_weights(folder, weight_name=DIFFUSERS_FILE, adapter_name=name)


def _draw(bundle: Bundle, pipeline: Any, steps: int, seed: int) -> torch.Tensor:
    return latents_by(pipeline, bundle, steps=steps, seed=seed, size=bundle.native_size).float()
