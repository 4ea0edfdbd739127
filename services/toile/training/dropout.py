"""Dropout whose masks are the images' own, however these are shared out and computed.

torch draws a mask for a whole tensor, from one state. Which numbers an image gets then depends on
what else is computed with it and before it, and a run that has other ranks or pieces, or goes on
from a checkpoint, would be another run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toile.training.data import generator


class ImageDropout(nn.Module):
    """As `nn.Dropout`, on tensors whose first axis is the images.

    The mask of an image follows from the seed, the layer, the step, and the image's place in the
    step: backward passes that compute a layer again draw it again.

    Attributes:
        step: Steps done before this one.
        places: Of the images of the next forward, among those of the step on all ranks.
    """

    def __init__(self, share: float, *, seed: int, layer: int) -> None:
        """Zero a share of the numbers; `layer` tells the dropouts of a network apart."""
        super().__init__()
        self._share = share
        self._seed = seed
        self._layer = layer
        self.step = 0
        self.places: Sequence[int] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, ...]` to the same."""
        if not self.training:
            return hidden
        dropped = [
            torch.rand(
                hidden.shape[1:],
                generator=generator(
                    self._seed, self.step, place, self._layer, device=hidden.device
                ),
                device=hidden.device,
            )
            < self._share
            for place, _ in zip(self.places, hidden, strict=True)
        ]
        return hidden.masked_fill(torch.stack(dropped), 0.0) / (1.0 - self._share)


def image_dropouts(network: nn.Module) -> list[ImageDropout]:
    """The dropouts of a network."""
    return [module for module in network.modules() if isinstance(module, ImageDropout)]
