"""The part of LoRAs that changes a base's text encoders, applied while prompts are encoded.

Nothing of an encoder is changed: its Linears add what the adapters make of their inputs for the
length of a block, as peft computes it, and are as they were afterwards (ADR 18).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from toile.diffusion.adapter_fit import check_layers
from toile.diffusion.adapters import (
    AdapterWeights,
    LoraLayer,
    linear_targets,
    text_path,
)


@dataclass(frozen=True, eq=False)
class TextAdapter:
    """An adapter to encode prompts with."""

    key: str
    """What tells it from others."""
    weights: AdapterWeights
    weight: float
    """Strength, the same for the whole of a drawing."""


def empty_text_encoders(base: Path) -> Mapping[str, nn.Module]:
    """Return the text encoders of a base in a folder on the meta device, by name."""
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        return {
            name: cls(CLIPTextConfig.from_json_file(base / name / "config.json"))
            for name, cls in classes.items()
        }


def text_targets(encoders: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return the Linears of text encoders, given by name: (in, out) by module path in files."""
    return {
        text_path(f"{name}.{path}"): shape
        for name, encoder in encoders.items()
        for path, shape in linear_targets(encoder).items()
    }


@contextlib.contextmanager
def adapted(encoders: Mapping[str, nn.Module], adapters: Sequence[TextAdapter]) -> Iterator[None]:
    """Add adapters to text encoders, given by name, for the length of a block.

    Nobody else may use the encoders meanwhile.

    Raises:
        InvalidArgumentError: An adapter does not fit them (`ADAPTER_MISMATCH`).
    """
    if not adapters:
        yield
        return
    targets = text_targets(encoders)
    updates: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter in adapters:
        check_layers(adapter.weights.text_layers, targets)
        for path, layer in adapter.weights.text_layers.items():
            updates.setdefault(path, []).append((layer, adapter.weight))
    modules = {
        text_path(f"{name}.{path}"): encoder.get_submodule(path)
        for name, encoder in encoders.items()
        for path in linear_targets(encoder)
    }
    with contextlib.ExitStack() as hooks:
        for path, layers in updates.items():
            hook = modules[path].register_forward_hook(_Addition(layers, modules[path]))
            hooks.callback(hook.remove)
        yield


class _Addition:
    """A forward hook that adds `weight * alpha / rank * up (down x)` of each layer, in fp32."""

    def __init__(self, layers: Sequence[tuple[LoraLayer, float]], module: nn.Module) -> None:
        device = next(module.parameters()).device
        self._layers = [
            (
                layer.down.to(device, torch.float32),
                layer.up.to(device, torch.float32),
                weight * layer.alpha / layer.rank,
            )
            for layer, weight in layers
        ]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        found = output.float()
        for down, up, scale in self._layers:
            found = found + scale * nn.functional.linear(
                nn.functional.linear(inputs[0].float(), down), up
            )
        return found.to(output.dtype)
