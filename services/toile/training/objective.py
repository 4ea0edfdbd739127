"""What a recipe gives the loop to train by: its own examples, batches and loss.

The loop knows neither diffusion nor images. It asks which examples a step shows, has them made a
batch, and sums the loss of its pieces; checkpoints, ranks and schedules are its own business.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn


class StepBatch(Protocol):
    """One rank's share of a step."""

    def __len__(self) -> int:
        """Return how many examples it is of."""
        ...

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        ...

    def pieces(self, count: int) -> Sequence[Self]:
        """The batch in at most `count` pieces of about one size, in order."""
        ...


B = TypeVar("B", bound=StepBatch)


class Objective(Protocol[B]):
    """What is learned. All that is random in it follows from the seed, the step and the place."""

    def order(self, shown: Sequence[int]) -> Callable[[int], list[int]]:
        """Return what says which examples a step shows, over all ranks.

        Args:
            shown: The dataset's that are trained on; those that are shown more often are named as
                often. Others than the dataset's may come behind them.
        """
        ...

    def batch(self, indices: Sequence[int], step: int, rank: int, world_size: int) -> B:
        """Make a rank's share of a step: of these examples every `world_size`-th from `rank` on."""
        ...

    def loss_sum(self, network: nn.Module, batch: B) -> Tensor:
        """Add up what each example of a batch loses."""
        ...

    def validation(self, held_out: Sequence[int]) -> Callable[[nn.Module, torch.device], float]:
        """Return what measures a network on examples that it is not trained on.

        Each rank asks it, and it answers the same number on each.
        """
        ...
