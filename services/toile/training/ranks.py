"""Which rank this process is, and what the ranks tell one another."""

import torch
from torch import Tensor
from torch import distributed as dist


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


def on_some_rank(told: bool, device: torch.device) -> bool:
    """Say on all ranks alike whether one was told; who left alone would be waited for forever."""
    return over_ranks(torch.tensor(float(told), device=device)) > 0


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if place()[1] > 1:
        dist.barrier()
