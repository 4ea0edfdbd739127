"""What a ControlNet is shown of a dataset's images, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toile.diffusion.bundle import Bundle
from toile.diffusion.vision import Vision
from toile.imaging.control_maps import ControlKind, palette
from toile.imaging.edges import canny
from toile.training.caches import Cache, OnProgress, remembered
from toile.training.data import Example, load_square

_VERSION = "1"  # of what is cached; a change makes old maps be computed again


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


def with_maps(
    cache: Cache,
    bundle: Bundle,
    examples: Sequence[Example],
    kind: ControlKind,
    folder: Path,
    *,
    dataset_digest: str,
    on_progress: OnProgress,
) -> ControlCache:
    """Add the maps of the squares that the latents are of, or take them from `folder`.

    Raises:
        FailedPreconditionError: Parts are asked of a base that has no segmenter
            (`BASE_LACKS_VISION`).
    """
    facts = (_VERSION, kind.value, dataset_digest, bundle.digest, str(bundle.native_size))
    found = remembered(
        folder, "maps", facts, lambda: {"planes": _planes(bundle, examples, kind, on_progress)}
    )
    colours = torch.from_numpy(palette(kind))
    return ControlCache(**vars(cache), planes=found["planes"], colours=colours)


def _planes(
    bundle: Bundle, examples: Sequence[Example], kind: ControlKind, on_progress: OnProgress
) -> Tensor:
    vision = Vision(bundle.path)
    planes: list[Tensor] = []
    for example in examples:
        square = load_square(example.path, bundle.native_size)
        if kind is ControlKind.PARTS:
            plane = vision.segment(square)[0]
        else:
            plane = canny(np.asarray(square))
        planes.append(torch.from_numpy(plane))
        on_progress(len(planes), len(examples))
    return torch.stack(planes)
