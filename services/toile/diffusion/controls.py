"""ControlNets in a drawing: maps that hold its structure, beside prompt and adapters.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023. The networks are
diffusers'. What they add to the UNet is computed where the UNet is: for SDXL at 1024 pixels it is
54 MB a sample and step in half precision.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError

from toile.core.errors import InvalidArgumentError
from toile.diffusion.loading import MAKING
from toile.diffusion.sdxl import PIXELS_PER_LATENT, TRAINED_TIMESTEPS

CONTROLNET_FOLDER = "controlnet"
"""Of a model version's network, in diffusers' layout; of a base's own, one for each kind of map."""
_SAME = (
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "layers_per_block",
    "projection_class_embeddings_input_dim",
)
"""What of a UNet's configuration a ControlNet for it has in common with it."""


Network = Callable[..., Any]
"""What is called like a `ControlNetModel`."""


@dataclass(frozen=True, eq=False)
class LoadedControl:
    """A ControlNet to draw with, and what it is shown."""

    network: Network
    image: Image.Image
    """The map; stretched to the size of the drawing."""
    scale: float = 1.0
    """How far it holds: 1 as trained, 0 not at all."""
    start: float = 0.0
    """Where in the noise schedule it sets in: 0 all noise, 1 none left."""
    end: float = 1.0
    """Where it lets go."""
    kind: str = ""
    """What the map shows, if the network is the base's own for that."""

    def pixels(self, height: int, width: int) -> "np.ndarray[Any, Any]":
        """Return the map for latents of this size: `[3, 8 height, 8 width]`, bytes."""
        size = (PIXELS_PER_LATENT * width, PIXELS_PER_LATENT * height)
        image = self.image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))

    def scale_at(self, timestep: float) -> float:
        """Return the strength at a timestep, of the 1000 that SDXL was trained with."""
        return self.scale if self.start <= 1.0 - timestep / TRAINED_TIMESTEPS <= self.end else 0.0


def load_controlnet(folder: Path, unet_config: Any) -> ControlNetModel:
    """Load a network in diffusers' layout for a UNet of this configuration, in fp32.

    Raises:
        InvalidArgumentError: It is none (`BAD_CONTROLNET`), or of another kind of UNet
            (`CONTROL_MISMATCH`).
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_controlnet(config, unet_config)
        with MAKING:
            network = ControlNetModel.from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidArgumentError(
            f"this is no ControlNet: {error}", field="controls", reason="BAD_CONTROLNET"
        ) from error
    return network.eval().requires_grad_(False)


def check_controlnet(config: Any, unet_config: Any) -> None:
    """Refuse a ControlNet's configuration that does not fit a UNet's.

    Raises:
        InvalidArgumentError: It does not (`CONTROL_MISMATCH`).
    """
    for name in _SAME:
        theirs, ours = config.get(name), unet_config.get(name)
        if _plain(theirs) != _plain(ours):
            raise InvalidArgumentError(
                f"the ControlNet is for another base: its {name} is {theirs}, not {ours}",
                field="controls",
                reason="CONTROL_MISMATCH",
            )


@contextlib.contextmanager
def controlled(
    unet: UNet2DConditionModel, controls: Sequence[LoadedControl]
) -> Iterator[UNet2DConditionModel]:
    """Have the networks add to what the UNet computes, until the end."""
    if not controls:
        yield unet
        return
    with shadowed(unet, _with_controls(unet.forward, controls)):
        yield unet


@contextlib.contextmanager
def shadowed(unet: UNet2DConditionModel, forward: Callable[..., Any]) -> Iterator[None]:
    """Put a forward in place of the one that a UNet has, until the end."""
    before = vars(unet).get("forward")  # None: the class's
    unet.forward = forward
    try:
        yield
    finally:
        if before is None:
            del unet.forward
        else:
            unet.forward = before


def _with_controls(
    forward: Callable[..., Any], controls: Sequence[LoadedControl]
) -> Callable[..., Any]:
    maps: dict[tuple[int, int, int], torch.Tensor] = {}

    def map_of(index: int, sample: torch.Tensor) -> torch.Tensor:
        """The map of a control at the size of the sample `[B, 4, h, w]`, as `[1, 3, H, W]`."""
        height, width = sample.shape[-2:]
        if (index, height, width) not in maps:
            pixels = torch.from_numpy(controls[index].pixels(height, width))
            maps[index, height, width] = pixels[None].to(sample.device, torch.float32) / 255.0
        return maps[index, height, width]

    def run(sample: torch.Tensor, timestep: Any, **conditions: Any) -> Any:
        downs: list[torch.Tensor] = []
        mid: torch.Tensor | None = None
        for index, control in enumerate(controls):
            scale = control.scale_at(float(torch.as_tensor(timestep).flatten()[0]))
            if not scale:
                continue
            more_downs, more_mid = control.network(
                sample,
                timestep,
                encoder_hidden_states=conditions["encoder_hidden_states"],
                controlnet_cond=map_of(index, sample).expand(len(sample), -1, -1, -1),
                conditioning_scale=scale,
                added_cond_kwargs=conditions["added_cond_kwargs"],
                return_dict=False,
            )
            # Several add up, as in diffusers' MultiControlNetModel.
            if mid is None:
                downs, mid = list(more_downs), more_mid
            else:
                downs = [a + b for a, b in zip(downs, more_downs, strict=True)]
                mid = mid + more_mid
        if mid is not None:
            conditions["down_block_additional_residuals"] = downs
            conditions["mid_block_additional_residual"] = mid
        return forward(sample, timestep, **conditions)

    return run


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
