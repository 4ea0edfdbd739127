"""SDXL's UNet at its full size with random weights.

For sizes and times where its weights are not at hand: they do not depend on the values.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

SDXL_UNET_CONFIG: dict[str, Any] = {
    # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, without what is the default.
    "sample_size": 128,
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
"""2.567 billion parameters."""

MINIATURE_UNET_CONFIG: dict[str, Any] = {
    **SDXL_UNET_CONFIG,
    "sample_size": 16,
    "addition_time_embed_dim": 32,
    "attention_head_dim": (1, 2, 4),
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
}
"""The same kind of network, thousands of times smaller, to try programs with."""


def random_unet(
    config: dict[str, Any], *, dtype: torch.dtype, device: str = "cpu"
) -> UNet2DConditionModel:
    """Make a UNet without a second copy of its weights in memory at any time.

    Weights are drawn so narrowly that activations stay finite in half precision.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).type(dtype)
    unet.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5 / parameter[0].numel() ** 0.5, generator=generator)
        else:
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.data.fill_(float(is_norm_weight))
    unet.eval().requires_grad_(requires_grad=False)
    return unet
