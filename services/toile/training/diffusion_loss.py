"""Noise-prediction losses that hold for every `prediction_type` a scheduler can have."""

from typing import Protocol

import torch
from torch import Tensor


class NoiseScheduler(Protocol):
    """What the losses need of a diffusers scheduler."""

    alphas_cumprod: Tensor

    @property
    def config(self) -> object:
        """The scheduler's configuration, with `prediction_type`."""


def prediction_type(scheduler: NoiseScheduler) -> str:
    """`epsilon`, `v_prediction` or `sample`, as the scheduler was configured."""
    return str(getattr(scheduler.config, "prediction_type", "epsilon"))


def signal_to_noise(scheduler: NoiseScheduler, timesteps: Tensor) -> Tensor:
    """Ratio of signal to noise power `[B]` at integer timesteps `[B]`."""
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas / (1.0 - alphas)


def add_noise(
    scheduler: NoiseScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Noised latents of the forward process, variance preserving; shapes `[B, C, H, W]`, `[B]`."""
    signal, spread = _amplitudes(scheduler, latents, timesteps)
    return signal * latents + spread * noise


def prediction_target(
    scheduler: NoiseScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the network should answer, by the scheduler's `prediction_type`.

    Raises:
        ValueError: the prediction type is unknown.
    """
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    if kind == "v_prediction":
        signal, spread = _amplitudes(scheduler, latents, timesteps)
        return signal * noise - spread * latents
    raise ValueError(f"unknown prediction type {kind!r}")


def min_snr_weights(scheduler: NoiseScheduler, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights `[B]` of the squared error that cap the pull of nearly clean samples.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023: min(SNR,
    gamma) in terms of the clean sample, divided by what the prediction type already contributes.
    """
    ratio = signal_to_noise(scheduler, timesteps)
    capped = ratio.clamp(max=gamma)
    kind = prediction_type(scheduler)
    if kind == "v_prediction":
        return capped / (ratio + 1.0)
    if kind == "sample":
        return capped
    return capped / ratio


def offset_noise(noise: Tensor, offset: float, source: torch.Generator) -> Tensor:
    """Noise `[C, h, w]` that also moves each channel as a whole, so that mean colours are learned.

    Guttenberg, "Diffusion with Offset Noise", 2023; as `--noise_offset` of diffusers' trainers.
    Without an offset nothing is drawn.
    """
    if not offset:
        return noise
    return noise + offset * torch.randn(noise.shape[0], 1, 1, generator=source)


def squared_or_huber(errors: Tensor, huber_c: float) -> Tensor:
    """Squared errors, or with `huber_c` the pseudo-Huber loss of them, of the errors' shape.

    `2c (sqrt(e² + c²) - c)`, which is e² for small errors and 2c|e| for large ones: the form of
    diffusers' scheduled Huber loss example and of kohya's trainers (`--loss_type huber`).
    """
    if not huber_c:
        return errors.pow(2)
    squared = errors.pow(2)
    # The same, without the difference of nearly equal numbers that small errors would make.
    return 2.0 * huber_c * squared / ((squared + huber_c**2).sqrt() + huber_c)


def weighted_error(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of each sample's mean squared error times its weight."""
    squared = (predicted.float() - target.float()).pow(2).flatten(1).mean(dim=1)
    return torch.mean(squared * weights)


def _amplitudes(
    scheduler: NoiseScheduler, latents: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    alphas = scheduler.alphas_cumprod.to(latents.device)[timesteps].to(latents.dtype)
    alphas = alphas.view(-1, 1, 1, 1)
    return alphas.sqrt(), (1.0 - alphas).sqrt()
