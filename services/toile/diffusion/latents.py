"""Between images and latents, on the plane or on a lattice of copies."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from toile.diffusion.bundle import Bundle
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.imaging import seams
from toile.imaging.seams import Repeat

MARGIN = 4
"""Latents around a tile that repeats, so that the VAE sees the tile's own copies beyond its
edges. Most of a seam goes with 2 (a score of 1.28 on the tiny base), the rest with 4 (1.20)."""

_images = VaeImageProcessor(vae_scale_factor=PIXELS_PER_LATENT)


def window(
    tensor: torch.Tensor, repeat: Repeat, corner: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Return a window `[..., *size]` on the plane that a tile `[..., H, W]` fills by repeating."""
    height, width = tensor.shape[-2:]
    rows, columns = seams.window(repeat, (height, width), corner, size)
    down, across = (torch.from_numpy(one).to(tensor.device) for one in (rows, columns))
    return tensor[..., down, across]


def decode(bundle: Bundle, latents: torch.Tensor, repeat: Repeat | None = None) -> Image.Image:
    """Turn latents `[1, 4, H/8, W/8]` into an image; outside of the denoiser's session."""
    vae = bundle.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    if (moments := _moments(vae, latents)) is not None:
        mean, deviation = moments
        latents = latents * deviation + mean
    if repeat is not None:
        latents = _with_margin(latents, repeat, MARGIN)
    decoded = vae.decode(latents, return_dict=False)[0]
    if repeat is not None:
        decoded = _without_margin(decoded, MARGIN * PIXELS_PER_LATENT)
    image: Image.Image = _images.postprocess(decoded, output_type="pil")[0]
    return image


def encode(
    bundle: Bundle, image: Image.Image, generator: torch.Generator, repeat: Repeat | None = None
) -> torch.Tensor:
    """Turn an image into latents `[1, 4, H/8, W/8]`, sampled as the stock pipelines do."""
    vae = bundle.vae
    pixels = _images.preprocess(image).to(device=vae.device, dtype=vae.dtype)
    if repeat is not None:
        pixels = _with_margin(pixels, repeat, MARGIN * PIXELS_PER_LATENT)
    latents: torch.Tensor = vae.encode(pixels).latent_dist.sample(generator)
    if repeat is not None:
        latents = _without_margin(latents, MARGIN)
    if (moments := _moments(vae, latents)) is not None:
        mean, deviation = moments
        latents = (latents - mean) / deviation
    scaling: float = vae.config.scaling_factor
    return latents * scaling


def _with_margin(tile: torch.Tensor, repeat: Repeat, margin: int) -> torch.Tensor:
    height, width = tile.shape[-2:]
    return window(tile, repeat, (-margin, -margin), (height + 2 * margin, width + 2 * margin))


def _without_margin(tensor: torch.Tensor, margin: int) -> torch.Tensor:
    return tensor[..., margin:-margin, margin:-margin]


def _moments(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return mean and deviation of a VAE's latents by channel, where its config has them."""
    mean, deviation = vae.config.latents_mean, vae.config.latents_std
    if mean is None or deviation is None:
        return None
    return (
        like.new_tensor(mean).view(1, -1, 1, 1),
        like.new_tensor(deviation).view(1, -1, 1, 1),
    )
