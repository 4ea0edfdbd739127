"""Stage `vae`: the autoencoder, on crops of renders and photographs."""

import json

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention

from toile.diffusion.architecture import NATIVE_SIZE, VAE_CONFIG
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.critic import PatchCritic, critic_loss, deception_loss
from toile.training.tiny_base.data import Pictures, load_photographs, load_renders
from toile.training.tiny_base.loop import averaged_state, run_stage, workers
from toile.training.tiny_base.vae_start import start_linear

_SMALL_CROP = 64
_SMALL_SHARE = 0.7
_KL_WEIGHT = 2e-6
_SCALING_RENDERS = 256
_PIXELS_ALONE_SHARE = 0.15  # of the decoder's steps, before the critic has a say
_DECEPTION_WEIGHT = 0.05


def train_vae(config: RecipeConfig) -> AutoencoderKL:
    """Train the autoencoder and give back its average with `scaling_factor` set from the data."""
    renders, photos = load_renders(config), load_photographs(config)
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(**VAE_CONFIG)
    start_linear(vae)
    vae.to(memory_format=torch.channels_last)

    rank, _ = workers()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 101, step, rank])
        crop, size = crop_schedule(step, config)
        batch = _crops(rng, renders, photos, config.photo_share_vae, crop, size)
        return reconstruction_loss(vae, batch, seed=2 * step + rank)

    run_stage(
        "vae", vae, loss, config.vae, config.workdir, checkpoint_seconds=config.checkpoint_seconds
    )
    return load_vae(config)


def train_decoder(config: RecipeConfig) -> None:
    """Train the decoder on alone, from the fixed encoder's latents of whole pictures.

    The latents stay what they are, so the denoisers need not wait for this stage. A critic joins
    in after a while: pixels' errors alone leave lace and other fine texture blurred.
    """
    renders, photos = load_renders(config), load_photographs(config)
    vae = load_vae(config)
    decoder = vae.decoder.requires_grad_(True).to(memory_format=torch.channels_last)
    critic = PatchCritic()
    critic_start = int(_PIXELS_ALONE_SHARE * config.decoder.steps)
    rank, _ = workers()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 107, step, rank])
        size = config.decoder.batch_size
        images = _crops(rng, renders, photos, config.photo_share_vae, NATIVE_SIZE, size)
        with torch.no_grad():
            latents = vae.post_quant_conv(vae.encode(images).latent_dist.mean)
        decoded = decoder(latents).float()
        total = pixel_loss(decoded, images) + critic_loss(critic, decoded, images)
        if step >= critic_start:
            total = total + _DECEPTION_WEIGHT * deception_loss(critic, decoded)
        return total

    run_stage(
        "decoder",
        nn.ModuleDict({"decoder": decoder, "critic": critic}),
        loss,
        config.decoder,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )


def load_vae(config: RecipeConfig) -> AutoencoderKL:
    """The trained autoencoder, its latents scaled to unit variance over the renders."""
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict(averaged_state(config.workdir, "vae"))
    if (config.workdir / "decoder" / "checkpoint.safetensors").exists():
        trained = averaged_state(config.workdir, "decoder")
        own = {n.removeprefix("decoder."): t for n, t in trained.items() if "critic." not in n}
        vae.decoder.load_state_dict(own)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=_scaling_factor(config, vae))
    return vae


def _scaling_factor(config: RecipeConfig, vae: AutoencoderKL) -> float:
    """What brings latents to unit variance; measured once and kept, as the denoisers rely on it."""
    kept = config.workdir / "vae" / "scaling.json"
    if not kept.exists():
        images = to_tensor(load_renders(config).images[:_SCALING_RENDERS])
        with torch.inference_mode():
            deviation = vae.encode(images).latent_dist.mean.std().item()
        kept.write_text(json.dumps({"scaling_factor": round(1.0 / deviation, 5)}), encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8"))["scaling_factor"])


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, *, seed: int) -> Tensor:
    """The pixels' loss through sampled latents, and a slight KL."""
    posterior = vae.encode(images).latent_dist
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    latents = posterior.mean.float() + posterior.std.float() * noise
    decoded = vae.decode(latents.to(memory_format=torch.channels_last)).sample.float()
    divergence = 0.5 * (
        posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()
    ).sum(dim=(1, 2, 3))
    total: Tensor = pixel_loss(decoded, images) + _KL_WEIGHT * divergence.mean()
    return total


def pixel_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of pixels, of their gradients and of a 4x reduction (for colour)."""
    error = F.l1_loss(decoded, images)
    for axis in (2, 3):
        error = error + F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    return error + F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4))


def to_tensor(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """`[N, H, W, 3]` bytes to `[N, 3, H, W]` in -1..1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


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
