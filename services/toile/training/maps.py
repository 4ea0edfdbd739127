"""What a ControlNet is shown of a dataset's images, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toile.diffusion.vision import Vision
from toile.imaging.control_maps import ControlKind, UInt8Array, joint_labels, palette
from toile.imaging.edges import canny
from toile.training.caches import Cache, OnProgress, on_one_thread
from toile.training.checks import lacks_maps
from toile.training.data import Example, load_square
from toile.training.masks import read_labels


@dataclass(frozen=True)
class ControlCache(Cache):
    """Encoded examples and what a ControlNet is shown of them.

    Attributes:
        planes: What each pixel is, an edge or not or which part, `[N, S, S]` of uint8: a third
            of what the maps would take. Of maps that came with the images these, `[N, 3, S, S]`.
        colours: What is shown for it, `[256, 3]` of uint8.
    """

    planes: Tensor
    colours: Tensor

    def maps(self, indices: Sequence[int]) -> Tensor:
        """The maps of some examples, `[B, 3, S, S]` of uint8."""
        if self.planes.ndim == 4:
            return self.planes[list(indices)]
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
    *,
    mask_labels: Sequence[str] = (),
) -> Tensor:
    """What each pixel of some examples is, `[N, S, S]` of uint8, or their maps `[N, 3, S, S]`.

    Parts are those of the dataset version's masks where these have the labels of the base's
    segmenter, which says what is drawn under later; of others the segmenter finds them.

    Args:
        vision: Of the base.
        examples: The dataset's.
        kind: What the maps show.
        native_size: S.
        on_progress: Told how many are done, and of how many.
        mask_labels: What the values of the version's masks mean.

    Raises:
        DataLossError: A mask or a map cannot be read.
        FailedPreconditionError: An example came with no map (`DATASET_LACKS_MAPS`), or parts
            are asked of a base that has no segmenter (`BASE_LACKS_VISION`).
    """
    planes: list[Tensor] = []
    with on_one_thread():
        for example in examples:
            square = load_square(example.path, native_size)
            image = np.asarray(square)
            if kind is ControlKind.GIVEN:
                if example.conditioning is None:
                    raise lacks_maps(example.file_name)
                shown = np.asarray(load_square(example.conditioning, native_size))
                plane = np.ascontiguousarray(shown.transpose(2, 0, 1))
            elif kind is ControlKind.EDGES:
                plane = canny(image)
            else:
                if example.mask is not None and mask_labels == vision.labels:
                    plane = _labels(example.mask, native_size)
                else:
                    plane = vision.segment(square)[0]
                if kind is ControlKind.EDGES_PARTS:
                    plane = joint_labels(image, plane)
            planes.append(torch.from_numpy(plane))
            on_progress(len(planes), len(examples))
    return torch.stack(planes)


def _labels(mask: Path, size: int) -> UInt8Array:
    """The labels of a mask's middle square, `[size, size]`."""
    labels = Image.fromarray(read_labels(mask))
    return np.array(labels.resize((size, size), Image.Resampling.NEAREST))
