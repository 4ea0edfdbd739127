"""What a ControlNet is shown of a dataset's images, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toile.diffusion.vision import Vision
from toile.imaging.control_maps import ControlKind, palette
from toile.imaging.edges import canny
from toile.training.caches import Cache, OnProgress, on_one_thread
from toile.training.data import Example, load_square


@dataclass(frozen=True)
class ControlCache(Cache):
    """Encoded examples and what a ControlNet is shown of them.

    Attributes:
        planes: What each pixel is, an edge or not or which part, `[N, S, S]` of uint8: a third
            of what the maps would take.
        colours: What is shown for it, `[256, 3]` of uint8.
    """

    planes: Tensor
    colours: Tensor

    def maps(self, indices: Sequence[int]) -> Tensor:
        """The maps of some examples, `[B, 3, S, S]` of uint8."""
        shown = self.colours[self.planes[list(indices)].long()]
        return shown.permute(0, 3, 1, 2).contiguous()


def with_maps(cache: Cache, planes: Tensor, kind: ControlKind) -> ControlCache:
    """Add the maps of the squares that the latents are of, by what `control_planes` found."""
    return ControlCache(**vars(cache), planes=planes, colours=torch.from_numpy(palette(kind)))


def control_planes(
    vision: Vision,
    examples: Sequence[Example],
    kind: ControlKind,
    native_size: int,
    on_progress: OnProgress,
) -> Tensor:
    """What each pixel of some examples is, `[N, S, S]` of uint8.

    Raises:
        FailedPreconditionError: Parts are asked of a base that has no segmenter
            (`BASE_LACKS_VISION`).
    """
    planes: list[Tensor] = []
    with on_one_thread():
        for example in examples:
            square = load_square(example.path, native_size)
            if kind is ControlKind.PARTS:
                plane = vision.segment(square)[0]
            else:
                plane = canny(np.asarray(square))
            planes.append(torch.from_numpy(plane))
            on_progress(len(planes), len(examples))
    return torch.stack(planes)
