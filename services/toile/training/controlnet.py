"""The ControlNet recipe's network in training: it learns what a frozen UNet should be told.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from toile.training.batches import compute_dtype, hold_frozen
from toile.training.config import ControlNetRecipeConfig

SDXL_EMBEDDING_CHANNELS = (16, 32, 96, 256)
"""Channels of the layers that look at a map, as in SDXL's public ControlNets."""
_SDXL_WIDTH = 320


def new_controlnet(unet: UNet2DConditionModel, *, seed: int) -> ControlNetModel:
    """Return a ControlNet that starts as the UNet's own encoder and changes nothing yet.

    A narrower UNet gets narrower layers to look at maps with.
    """
    share = min(1.0, int(unet.config.block_out_channels[0]) / _SDXL_WIDTH)
    channels = tuple(max(16, round(width * share / 8) * 8) for width in SDXL_EMBEDDING_CHANNELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    return network.to(unet.device)


def start_training(
    unet: UNet2DConditionModel,
    config: ControlNetRecipeConfig,
    initial: ControlNetModel | None = None,
) -> "ControlledUNet":
    """Freeze the UNet and put a ControlNet beside it.

    Args:
        unet: The base's.
        config: Of the training.
        initial: What it goes on from; a new one, the same for the same seed, when None.
    """
    controlnet = new_controlnet(unet, seed=config.seed) if initial is None else initial
    hold_frozen(unet.requires_grad_(False), compute_dtype(config, unet.device))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    return ControlledUNet(unet, controlnet)


class ControlledUNet(nn.Module):
    """A frozen UNet with a ControlNet in training."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        """Freeze the UNet; what is trained is the ControlNet."""
        super().__init__()
        self.controlnet = controlnet.requires_grad_(True)
        # Not a submodule: neither its parameters nor its mode are the network's in training.
        self._frozen: Sequence[UNet2DConditionModel] = (unet.eval().requires_grad_(False),)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        maps: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor],
        return_dict: bool = False,
    ) -> Any:
        """Predict as the UNet does, under the control of `maps` `[B, 3, 8h, 8w]`, 0 to 1.

        Args:
            sample: Noised latents `[B, 4, h, w]`.
            timestep: `[B]`.
            maps: What the ControlNet sees.
            encoder_hidden_states: `[B, tokens, D]`.
            added_cond_kwargs: `text_embeds` and `time_ids`, as the UNet takes them.
            return_dict: Whether to return it as the UNet does, not as a tuple.
        """
        down, mid = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            controlnet_cond=maps,
            added_cond_kwargs=dict(added_cond_kwargs),
            return_dict=False,
        )
        return self._frozen[0](
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=dict(added_cond_kwargs),
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=return_dict,
        )
