"""Images of several sizes: those of a step are all of one bucket.

Sizes are those of `toile.imaging.buckets`; a version of squares has one bucket, and a run on it is
what it would be without any.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from toile.training.caches import Cache
from toile.training.data import IMAGES, Example, batch_indices, generator

_ORDER = -4
"""Among the positions of `generator`; the buckets' own permutations have -5 and below."""


@dataclass(frozen=True)
class BucketedCache:
    """Encoded examples, those of each bucket together.

    Attributes:
        parts: The buckets' examples.
        places: Which of all examples they are, in their order.
        time_ids: What the UNet is told of each example's size, `[N, 6]`: height and width of the
            original, top and left of the cut, height and width of the image (Podell et al.,
            "SDXL", 2023, section 2.2).
    """

    parts: Sequence[Cache]
    places: Sequence[Sequence[int]]
    time_ids: Tensor

    def __len__(self) -> int:
        return len(self.time_ids)

    def located(self, indices: Sequence[int]) -> tuple[Cache, list[int]]:
        """Return the bucket that some examples are all of, and their places in it."""
        (number,) = {self.bucket_of(index) for index in indices}
        return self.parts[number], [self._locations[index][1] for index in indices]

    def bucket_of(self, index: int) -> int:
        """Return the number of an example's bucket."""
        return self._locations[index][0]

    @cached_property
    def _locations(self) -> Mapping[int, tuple[int, int]]:
        return {
            index: (number, place)
            for number, places in enumerate(self.places)
            for place, index in enumerate(places)
        }


def one_bucket(cache: Cache, native_size: int) -> BucketedCache:
    """Square examples of a base's own size, as if nothing had been cut off them."""
    facts = torch.tensor([[native_size, native_size, 0, 0, native_size, native_size]])
    return BucketedCache([cache], [range(len(cache))], facts.float().repeat(len(cache), 1))


def frames(examples: Sequence[Example]) -> Tensor:
    """What the UNet is told of examples that are in buckets, `[N, 6]`."""
    rows = [
        # Each is (horizontal, vertical), and the UNet takes the vertical first.
        [*reversed(frame.original_size), *reversed(frame.crop_left_top), *reversed(frame.size)]
        for frame in (example.frame for example in examples)
        if frame is not None
    ]
    return torch.tensor(rows, dtype=torch.float32)


class BucketOrder:
    """Which examples a step shows: a pure function of the seed and the step.

    The images of a bucket come in one permutation after the other, and are cut into batches as they
    come: a batch that an epoch leaves short is filled from the bucket's next permutation. An epoch
    has of each bucket the batches that are full by its end, in a random order of buckets. So each
    image is shown once in each permutation, and buckets are as often shown as they have images. A
    bucket with fewer images than a batch is not in every epoch, and shows some twice in one batch.

    With one bucket the order is that of `batch_indices`.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        """Take the examples of each bucket; those that are shown more often are named as often."""
        self._buckets, self._batch_size, self._seed = buckets, batch_size, seed
        self._filled = [number for number, bucket in enumerate(buckets) if bucket]

    def __call__(self, step: int) -> list[int]:
        """Return the examples of a step's global batch."""
        number, batch, of = self._filled[0], step, IMAGES
        if len(self._filled) > 1:
            number, batch = self._batch(step)
            of = _ORDER - 1 - number
        bucket = self._buckets[number]
        places = batch_indices(len(bucket), self._batch_size, batch, self._seed, of=of)
        return [bucket[place] for place in places]

    def _batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of its batches it is."""
        images = sum(len(bucket) for bucket in self._buckets)
        last = (step + 1 + len(self._buckets)) * self._batch_size // images + 1
        epoch = bisect.bisect_right(range(last + 1), step, key=self._batches_before) - 1
        first = self._batches_before(epoch)
        numbers = [
            number
            for number in self._filled
            for _ in range(self._full(number, epoch + 1) - self._full(number, epoch))
        ]
        order = torch.randperm(len(numbers), generator=generator(self._seed, _ORDER, epoch))
        shuffled = [numbers[place] for place in order.tolist()]
        number = shuffled[step - first]
        earlier = shuffled[: step - first].count(number)
        return number, self._full(number, epoch) + earlier

    def _batches_before(self, epoch: int) -> int:
        return sum(self._full(number, epoch) for number in self._filled)

    def _full(self, number: int, epochs: int) -> int:
        """How many batches of a bucket are full after so many epochs."""
        return epochs * len(self._buckets[number]) // self._batch_size
