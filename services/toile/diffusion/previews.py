"""Images so far, for almost nothing: what the UNet thinks the clean latents are, as colours.

The colours of a patch are nearly a linear function of its latents. The map is known for SDXL's
own VAE (https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204), as
other tools use it; here it is fitted to a base's VAE when it is first wanted, which costs the
encoding of a few small pictures. On the tiny base it is 18 to 21 dB from the decoded image and
takes 0.1 ms, where decoding takes 150.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

MAX_PREVIEW_SIDE = 512
"""Pixels."""

_SIDE = 128
_CELLS = (2, 4, 8, 16)


class Previewer:
    """Turns latents into a small image, one pixel for each."""

    def __init__(self, weights: torch.Tensor) -> None:
        """Take the map `[C + 1, 3]` of latents and a one to colours, black at -1 and white at 1."""
        self._weights = weights

    @classmethod
    @torch.inference_mode()
    def fit(cls, vae: Any) -> "Previewer":
        """Find the map for a VAE by least squares, on pictures of random colours."""
        pictures = _pictures().to(device=vae.device, dtype=vae.dtype)
        latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
        colours = functional.adaptive_avg_pool2d(pictures, latents.shape[-2:])
        features = _features(latents).flatten(0, -2)
        wanted = colours.movedim(1, -1).flatten(0, -2)
        return cls(torch.linalg.lstsq(features.float().cpu(), wanted.float().cpu()).solution)

    def __call__(self, latents: torch.Tensor) -> Image.Image:
        """Show latents `[1, C, h, w]` as an image of w by h pixels."""
        colours = (_features(latents.float().cpu()) @ self._weights)[0]
        return Image.fromarray(((colours + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy())


def enlarge(image: Image.Image, pixels_per_latent: int) -> Image.Image:
    """Bring a preview to the size of the image, or to `MAX_PREVIEW_SIDE` if that is less."""
    factor = min(float(pixels_per_latent), MAX_PREVIEW_SIDE / max(image.size))
    size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


class WatchedUNet:
    """A UNet for the stock pipelines that remembers what it took the clean latents to be."""

    def __init__(self, unet: Any, scheduler: Any, guidance_scale: float) -> None:
        """Watch a UNet whose predictions are of the scheduler's type."""
        self._unet, self._guidance_scale = unet, guidance_scale
        self._signal = scheduler.alphas_cumprod.double().numpy()
        self._kind = str(scheduler.config.prediction_type)
        self.clean: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(
        self, sample: torch.Tensor, timestep: Any, **conditions: Any
    ) -> tuple[torch.Tensor]:
        """Predict for one image: `[1, 4, H, W]`, or `[2, 4, H, W]`, unguided first."""
        predicted = self._unet(sample, timestep, **conditions)[0]
        plain, guided = predicted[:1], predicted[-1:]
        wanted = plain + self._guidance_scale * (guided - plain) if len(predicted) > 1 else plain
        # Samplers scale what the UNet sees to unit variance, whatever they keep themselves.
        signal = float(np.interp(float(timestep), range(len(self._signal)), self._signal))
        alpha, sigma = max(signal, 1e-8) ** 0.5, (1 - signal) ** 0.5
        noisy = sample[-1:]
        if self._kind == "epsilon":
            self.clean = (noisy - sigma * wanted) / alpha
        elif self._kind == "v_prediction":
            self.clean = alpha * noisy - sigma * wanted
        else:  # the sample itself
            self.clean = wanted
        return (predicted,)


def _features(latents: torch.Tensor) -> torch.Tensor:
    last = latents.movedim(1, -1)
    return torch.cat([last, torch.ones_like(last[..., :1])], dim=-1)


def _pictures() -> torch.Tensor:
    """Cells of random colours, sharp and smooth, of several sizes: `[8, 3, 128, 128]`, -1 to 1."""
    generator = torch.Generator().manual_seed(0)
    pictures: list[torch.Tensor] = []
    for cells in _CELLS:
        colours = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        pictures.append(functional.interpolate(colours, size=_SIDE, mode="nearest"))
        pictures.append(functional.interpolate(colours, size=_SIDE, mode="bicubic").clamp(-1, 1))
    return torch.cat(pictures)
