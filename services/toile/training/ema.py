"""An exponential moving average of weights, which is less noisy than the weights themselves."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class MovingAverage:
    """The average of named parameters over the steps, early steps forgotten sooner.

    As diffusers' `EMAModel` with its defaults: after update n, counted from 0, the average keeps
    `min(decay, (1 + n) / (10 + n))` of itself, and nothing after the first.

    Attributes:
        weights: The average, by the parameters' names.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from an average that was kept."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the parameters after a step, counted from 0."""
        kept = min(self._decay, (1.0 + step) / (10.0 + step)) if step else 0.0
        for name, average in self.weights.items():
            average.lerp_(self._parameters[name].detach(), 1.0 - kept)


@contextlib.contextmanager
def replaced(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other weights for the length of a block, and their own back, bit for bit."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    to_parameters(parameters, weights)
    try:
        yield
    finally:
        to_parameters(parameters, own)


@torch.no_grad()
def to_parameters(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
