"""This rank's share of a step, and the loss on it.

Shapes: B images in a step on this rank, C channels of a text embedding, P of a pooled one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from toile.diffusion.denoiser import cpu_has_bfloat16
from toile.training.caches import Cache, WeightedCache
from toile.training.config import RecipeConfig
from toile.training.data import generator
from toile.training.diffusion_loss import (
    add_noise,
    min_snr_weights,
    offset_noise,
    prediction_target,
    squared_or_huber,
)
from toile.training.maps import ControlCache

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step.

    Attributes:
        latents: Clean latents, `[B, 4, h, w]`.
        noise: What is added to them, `[B, 4, h, w]`.
        timesteps: How much of it, `[B]`.
        embeds: Text embeddings, `[B, 77, C]`, or tokens, `[B, 2, 77]`, as the cache has them.
        pooled: Pooled text embeddings, `[B, P]`; beside tokens `[B, 0]`.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    embeds: Tensor
    pooled: Tensor

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def pieces(self, count: int) -> list[Self]:
        """The batch in at most `count` pieces of about one size, in order."""
        parts = {name: torch.chunk(tensor, count) for name, tensor in vars(self).items()}
        return [
            type(self)(**dict(zip(parts, piece, strict=True)))
            for piece in zip(*parts.values(), strict=True)
        ]

    def conditions(self, time_ids: Tensor) -> dict[str, Any]:
        """What the network is told beside latents and timesteps; `time_ids` are `[B or 1, 6]`."""
        ids = time_ids.expand(len(self.latents), -1)
        return {
            "encoder_hidden_states": self.embeds,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": ids},
        }

    def weighed(self, errors: Tensor) -> Tensor:
        """Errors `[B, 4, h, w]`, each as much as it counts."""
        return errors


@dataclass(frozen=True)
class ControlBatch(Batch):
    """The same, with what a ControlNet is shown.

    Attributes:
        maps: `[B, 3, 8h, 8w]` of uint8.
    """

    maps: Tensor

    def conditions(self, time_ids: Tensor) -> dict[str, Any]:
        """What the network is told, the maps from 0 to 1 among it."""
        return {**super().conditions(time_ids), "maps": self.maps.float() / 255.0}


@dataclass(frozen=True)
class WeightedBatch(Batch):
    """The same, with what its errors count.

    Attributes:
        weights: `[B, 1, h, w]` or `[B, 1, 1, 1]`.
    """

    weights: Tensor

    def weighed(self, errors: Tensor) -> Tensor:
        """Errors `[B, 4, h, w]`, times the weights of their places."""
        return errors * self.weights


def make_batch(
    cache: Cache,
    indices: Sequence[int],
    config: RecipeConfig,
    step: int,
    scheduler: DDPMScheduler,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Draw this rank's share of a step; each image's draws are its own, whichever rank has it."""
    latents: list[Tensor] = []
    noises: list[Tensor] = []
    timesteps: list[int] = []
    captions: list[int] = []
    for place in range(rank, len(indices), world_size):
        index = indices[place]
        source = generator(config.seed, step, place)
        mean, deviation = cache.means[index], cache.deviations[index]
        latents.append(mean + deviation * torch.randn(mean.shape, generator=source))
        noise = torch.randn(mean.shape, generator=source)
        total = int(scheduler.config.num_train_timesteps)
        timesteps.append(int(torch.randint(total, (1,), generator=source)))
        dropped = float(torch.rand(1, generator=source)) < config.caption_dropout
        captions.append(0 if dropped else int(cache.captions[index]))
        # Last, so that the other draws do not depend on whether there is an offset.
        noises.append(offset_noise(noise, config.noise_offset, source))
    return assembled(
        cache,
        indices[rank::world_size],
        captions,
        latents=torch.stack(latents),
        noise=torch.stack(noises),
        timesteps=torch.tensor(timesteps),
    )


def assembled(
    cache: Cache, indices: Sequence[int], captions: Sequence[int], **drawn: Tensor
) -> Batch:
    """What was drawn for some examples, with what the cache has of them.

    Args:
        cache: The examples.
        indices: Which of them, B.
        captions: Which text embedding each gets, B.
        drawn: `latents`, `noise` and `timesteps`.
    """
    texts = list(captions)
    batch = Batch(embeds=cache.embeds[texts], pooled=cache.pooled[texts], **drawn)
    if isinstance(cache, ControlCache):
        return ControlBatch(**vars(batch), maps=cache.maps(indices))
    if isinstance(cache, WeightedCache):
        return WeightedBatch(**vars(batch), weights=cache.weights[list(indices)])
    return batch


def loss_sum(
    model: nn.Module,
    batch: Batch,
    scheduler: DDPMScheduler,
    config: RecipeConfig,
    time_ids: Tensor,
) -> Tensor:
    """Weighted errors, meant over each image and summed over this rank's images."""
    noised = add_noise(scheduler, batch.latents, batch.noise, batch.timesteps)
    target = prediction_target(scheduler, batch.latents, batch.noise, batch.timesteps)
    with half_precision(noised.device, compute_dtype(config, noised.device)):
        predicted = model(noised, batch.timesteps, **batch.conditions(time_ids), return_dict=False)[
            0
        ]
    errors = batch.weighed(squared_or_huber(predicted.float() - target, config.huber_c))
    errors = errors.flatten(1).mean(dim=1)
    if config.min_snr_gamma:
        errors = errors * min_snr_weights(scheduler, batch.timesteps, config.min_snr_gamma)
    total: Tensor = errors.sum()
    return total


def compute_dtype(config: RecipeConfig, device: torch.device) -> torch.dtype:
    """What networks compute in: as configured, or bf16 where the hardware computes in it."""
    if config.mixed_precision == "auto":
        is_fast = device.type != "cpu" or cpu_has_bfloat16()
        return torch.bfloat16 if is_fast else torch.float32
    return _DTYPES[config.mixed_precision]


@contextlib.contextmanager
def half_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype`; none to fp32."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        yield


def hold_frozen(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Keep frozen weights as autocast would cast them in each forward: half the memory, no casts.

    What is computed is the same, bit for bit. Norms stay fp32, in which autocast computes them;
    so does `conv_in`, whose type is what diffusers' pipelines take for the network's and draw in.
    """
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module is not unet.conv_in:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
