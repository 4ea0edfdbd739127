"""Drawing with diffusers' stock pipeline over a bundle's shared parts, by several threads."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from toile.diffusion.bundle import Bundle
from toile.diffusion.schedulers import make_scheduler

PROMPT = "a red floral cotton dress on white background"
GUIDANCE_SCALE = 3.0


def stock_pipeline(bundle: Bundle, unet: Any, *, encoders: bool = False) -> Any:
    """Return a stock pipeline of its own, which shares the bundle's networks.

    Args:
        bundle: The base.
        unet: What it draws with.
        encoders: Whether it encodes prompts itself.
    """
    pipeline = StableDiffusionXLPipeline(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder if encoders else None,
        text_encoder_2=bundle.text_encoder_2,  # asked for the width of its projection
        tokenizer=bundle.tokenizer if encoders else None,
        tokenizer_2=bundle.tokenizer_2 if encoders else None,
        unet=unet,
        scheduler=make_scheduler("", bundle.scheduler_config),
        force_zeros_for_empty_prompt=bundle.zeros_for_empty_negative,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_latents(bundle: Bundle, unet: Any, *, steps: int, seed: int, size: int) -> torch.Tensor:
    """Draw latents `[1, 4, size / 8, size / 8]` of the benchmark's prompt."""
    return latents_by(stock_pipeline(bundle, unet), bundle, steps=steps, seed=seed, size=size)


@torch.inference_mode()
def latents_by(pipeline: Any, bundle: Bundle, *, steps: int, seed: int, size: int) -> torch.Tensor:
    """Draw the same by a pipeline, in its own type."""
    latents: torch.Tensor = pipeline(
        **bundle.encode_prompt(PROMPT).arguments(1),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator("cpu").manual_seed(seed),
        width=size,
        height=size,
        output_type="latent",
    ).images
    return latents


@torch.inference_mode()
def decode(bundle: Bundle, latents: torch.Tensor) -> Image.Image:
    """Turn latents of one image into the image."""
    vae = bundle.vae
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample[0]
    values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
