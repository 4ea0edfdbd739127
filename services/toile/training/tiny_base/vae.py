"""Stage `vae`: the autoencoder, on crops of renders and photographs."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  torch's own convention

from toile.diffusion.architecture import NATIVE_SIZE, VAE_CONFIG
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import Pictures, load_photographs, load_renders
from toile.training.tiny_base.loop import averaged_state, run_stage

_SMALL_CROP = 64
_SMALL_SHARE = 0.7
_KL_WEIGHT = 2e-6


def train_vae(config: RecipeConfig) -> AutoencoderKL:
    """Train the autoencoder and give back its average with `scaling_factor` set from the data."""
    renders, photos = load_renders(config), load_photographs(config)
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 101, step])
        crop, size = crop_schedule(step, config)
        batch = _crops(rng, renders, photos, config.photo_share_vae, crop, size)
        return reconstruction_loss(vae, batch, seed=step)

    run_stage(
        "vae", vae, loss, config.vae, config.workdir, checkpoint_seconds=config.checkpoint_seconds
    )
    return load_vae(config)


def load_vae(config: RecipeConfig) -> AutoencoderKL:
    """The trained autoencoder, its latents scaled to unit variance over the renders."""
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict(averaged_state(config.workdir, "vae"))
    vae.eval().requires_grad_(False)
    images = to_tensor(load_renders(config).images[:256])
    with torch.inference_mode():
        deviation = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=round(1.0 / deviation, 5))
    return vae


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, *, seed: int) -> Tensor:
    """L1 of pixels, of their gradients and of a 4x reduction (for colour), and a slight KL."""
    posterior = vae.encode(images).latent_dist
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    latents = posterior.mean.float() + posterior.std.float() * noise
    decoded = vae.decode(latents.to(memory_format=torch.channels_last)).sample.float()
    error = F.l1_loss(decoded, images)
    for axis in (2, 3):
        error = error + F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    coarse = F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4))
    divergence = 0.5 * (
        posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()
    ).sum(dim=(1, 2, 3))
    total: Tensor = error + coarse + _KL_WEIGHT * divergence.mean()
    return total


def to_tensor(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """`[N, H, W, 3]` bytes to `[N, 3, H, W]` in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def crop_schedule(step: int, config: RecipeConfig) -> tuple[int, int]:
    """Crop side and batch size of a step: many small crops first, whole pictures at the end."""
    if step < _SMALL_SHARE * config.vae.steps:
        return _SMALL_CROP, config.vae.batch_size
    return NATIVE_SIZE, max(1, config.vae.batch_size // 2)


def _crops(
    rng: np.random.Generator,
    renders: Pictures,
    photos: Pictures,
    photo_share: float,
    crop_side: int,
    size: int,
) -> Tensor:
    from_photos = int(rng.binomial(size, photo_share)) if len(photos.images) else 0
    chosen = [
        *(renders.images[i] for i in rng.integers(len(renders.images), size=size - from_photos)),
        *(photos.images[i] for i in rng.integers(max(1, len(photos.images)), size=from_photos)),
    ]
    crops = []
    for image in chosen:
        top, left = rng.integers(image.shape[0] - crop_side + 1, size=2)
        crop = image[top : top + crop_side, left : left + crop_side]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_tensor(np.stack(crops)).contiguous(memory_format=torch.channels_last)
