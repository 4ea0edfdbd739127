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
