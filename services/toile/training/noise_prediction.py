"""What a UNet learns: the noise of latents, by the schedule that the base was trained with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from toile.training.batches import Batch, loss_sum, make_batch
from toile.training.buckets import BucketedCache, BucketOrder, one_bucket
from toile.training.caches import Cache
from toile.training.config import RecipeConfig
from toile.training.data import CLASS_IMAGES, batch_indices
from toile.training.validation import Validation


@dataclass(frozen=True)
class FramedBatch:
    """A batch, and what the UNet is told of its images' sizes.

    Attributes:
        drawn: The batch.
        time_ids: `[B, 6]`, as a `BucketedCache` has them.
    """

    drawn: Batch
    time_ids: Tensor

    def __len__(self) -> int:
        return len(self.time_ids)

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        return type(self)(self.drawn.to(device), self.time_ids.to(device))

    def pieces(self, count: int) -> list[Self]:
        """The batch in at most `count` pieces of about one size, in order."""
        pairs = zip(self.drawn.pieces(count), torch.chunk(self.time_ids, count), strict=True)
        return [type(self)(drawn, time_ids) for drawn, time_ids in pairs]


class NoisePrediction:
    """The objective of LoRAs and ControlNets.

    Each step shows as many class images, where there are any, as of the dataset's.
    """

    def __init__(
        self,
        cache: Cache | BucketedCache,
        scheduler: DDPMScheduler,
        config: RecipeConfig,
        *,
        image_count: int,
        native_size: int,
    ) -> None:
        """Make it.

        Args:
            cache: The examples, with what the network is told of them: the dataset's, and then
                class images. Those that are not in buckets are all of the base's own size.
            scheduler: Noise schedule and prediction type of the base.
            config: The recipe's configuration.
            image_count: How many of the examples are the dataset's.
            native_size: Side of the images that the base was trained for, pixels.
        """
        bucketed = one_bucket(cache, native_size) if isinstance(cache, Cache) else cache
        self._cache, self._scheduler, self._config = bucketed, scheduler, config
        self._class_images = range(image_count, len(cache))

    def order(self, shown: Sequence[int]) -> Callable[[int], list[int]]:
        """See `Objective.order`: the images of a step are all of one size."""
        buckets: list[list[int]] = [[] for _ in self._cache.parts]
        for index in shown:
            buckets[self._cache.bucket_of(index)].append(index)
        of_dataset = BucketOrder(buckets, self._config.batch_size, self._config.seed)
        return lambda step: of_dataset(step) + self._of_class(step)

    def batch(self, indices: Sequence[int], step: int, rank: int, world_size: int) -> FramedBatch:
        """See `Objective.batch`."""
        part, places = self._cache.located(indices)
        drawn = make_batch(part, places, self._config, step, self._scheduler, rank, world_size)
        return FramedBatch(drawn, self._cache.time_ids[indices[rank::world_size]])

    def loss_sum(self, network: nn.Module, batch: FramedBatch) -> Tensor:
        """See `Objective.loss_sum`."""
        return loss_sum(network, batch.drawn, self._scheduler, self._config, batch.time_ids)

    def validation(self, held_out: Sequence[int]) -> Callable[[nn.Module, torch.device], float]:
        """See `Objective.validation`."""
        return Validation(self._cache, held_out, self._scheduler, self._config).loss

    def _of_class(self, step: int) -> list[int]:
        indices, config = self._class_images, self._config
        if not indices:
            return []
        places = batch_indices(len(indices), config.batch_size, step, config.seed, of=CLASS_IMAGES)
        return [indices[place] for place in places]
