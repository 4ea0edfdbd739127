"""The loss on images that a run does not train on, from the same draws every time."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from toile.training.batches import Batch, assembled, loss_sum
from toile.training.buckets import BucketedCache
from toile.training.config import RecipeConfig
from toile.training.data import generator
from toile.training.ranks import over_ranks, place

TIMESTEPS_PER_IMAGE = 4
"""Each image is noised this often, at the middles of as many equal parts of the schedule."""

_DRAW = -2  # among the positions of `data.generator`; steps are 0 and more, epochs -1


class Validation:
    """The loss of the recipe on held-out images, captions kept and no noise offset."""

    def __init__(
        self,
        cache: BucketedCache,
        held_out: Sequence[int],
        scheduler: DDPMScheduler,
        config: RecipeConfig,
    ) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._config = config
        ordered = sorted(held_out, key=cache.bucket_of)
        self._draws = [(image, part) for image in ordered for part in range(TIMESTEPS_PER_IMAGE)]

    @torch.no_grad()
    def loss(self, unet: nn.Module, device: torch.device) -> float:
        """The mean over all draws, shared out among the ranks; the same number on each."""
        total = torch.zeros((), device=device)
        for batch, time_ids in self._batches():
            on_device, ids = batch.to(device), time_ids.to(device)
            total += loss_sum(unet, on_device, self._scheduler, self._config, ids)
        return over_ranks(total) / len(self._draws)

    def _batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's draws, as many of a size at a time as a training step computes."""
        rank, world_size = place()
        config = self._config
        size = max(1, config.batch_size // (config.gradient_accumulation_steps * world_size))
        mine = self._draws[rank::world_size]
        for _, group in itertools.groupby(mine, lambda draw: self._cache.bucket_of(draw[0])):
            of_bucket = list(group)
            for first in range(0, len(of_bucket), size):
                draws = of_bucket[first : first + size]
                time_ids = self._cache.time_ids[[image for image, _ in draws]]
                yield self._batch(draws), time_ids

    def _batch(self, draws: Sequence[tuple[int, int]]) -> Batch:
        cache, images = self._cache.located([image for image, _ in draws])
        total = int(self._scheduler.config.num_train_timesteps)
        latents = cache.means[images]
        sources = [generator(self._config.seed, _DRAW, *draw) for draw in draws]
        return assembled(
            cache,
            images,
            cache.captions[images].tolist(),
            latents=latents,
            noise=torch.stack([torch.randn(latents.shape[1:], generator=s) for s in sources]),
            timesteps=torch.tensor(
                [int((part + 0.5) / TIMESTEPS_PER_IMAGE * total) for _, part in draws]
            ),
        )


def best_step(losses: Mapping[int, float]) -> int:
    """The step with the lowest loss, the first of several; 0 if there is none."""
    return min(losses, key=lambda step: (losses[step], step), default=0)


def is_exhausted(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` validations were no better than the best; never if it is 0."""
    best = best_step(losses)
    return patience > 0 and sum(step > best for step in losses) >= patience
