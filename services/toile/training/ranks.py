"""Which rank this process is, and what the ranks tell one another."""

from collections.abc import Generator
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


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


def on_some_rank(told: tuple[bool, bool], device: torch.device) -> tuple[bool, bool]:
    """Say on all ranks alike what one was told; who left alone would be waited for forever."""
    counts = torch.tensor([float(one) for one in told], device=device)
    if place()[1] > 1:
        dist.all_reduce(counts)
    first, second = (counts > 0).tolist()
    return first, second


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if place()[1] > 1:
        dist.barrier()


def led(work: Generator[None, None, T] | None, device: torch.device) -> T | None:
    """Let the leading rank work while the others wait, a piece at a time.

    A rank waits for another no longer than Ray Train's collective timeout, which all pieces
    together may exceed.

    Args:
        work: Yields after each piece, and returns the result; None on the other ranks.
        device: Of the ranks' tensors.

    Returns:
        The result, on the leading rank alone.
    """
    if work is None:
        while over_ranks(torch.zeros((), device=device)):
            pass
        return None
    while True:
        try:
            next(work)
        except StopIteration as end:
            over_ranks(torch.zeros((), device=device))
            result: T = end.value
            return result
        over_ranks(torch.ones((), device=device))
