"""Which rank this process is, and what the ranks tell one another."""

import torch
from torch import Tensor
from torch import distributed as dist

from toile.core.errors import CancelledError


def place() -> tuple[int, int]:
    """This process's rank, and how many train together; 0 of 1 without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def over_ranks(value: Tensor) -> float:
    """The sum of a number over all ranks, the same on each; `value` is overwritten."""
    if place()[1] > 1:
        dist.all_reduce(value)
    return float(value)


def agree_to_go_on(stop: bool, device: torch.device) -> None:
    """Stop on all ranks in the same step, or the others would wait for this one forever.

    Raises:
        CancelledError: Some rank was told to stop.
    """
    if over_ranks(torch.tensor(float(stop), device=device)):
        raise CancelledError("the run was stopped")
