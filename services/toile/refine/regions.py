"""From a label map to the pixels that an edit may change."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from toile.core.errors import FailedPreconditionError
from toile.imaging import masks
from toile.refine.words import BACKGROUND, GARMENT

BoolArray: TypeAlias = npt.NDArray[np.bool_]

_RIM_SHARE = 0.012  # of the longer side: how far a drawn garment's colour bleeds
_LEAST_SHARE = 0.002  # of the image; less is a slip of the segmenter


@dataclass(frozen=True)
class Region:
    """Pixels `[H, W]` of the image that an edit may change, and their share of it, 0..1."""

    name: str
    mask: BoolArray
    share: float


def find_region(
    label_png: bytes, labels: Sequence[str], wanted: str, size: tuple[int, int]
) -> Region:
    """The wanted region of an image.

    Args:
        label_png: Greyscale PNG of label values, of the image's shape or a smaller copy's.
        labels: Names of the values.
        wanted: `garment` for everything but the background, or a label.
        size: Width and height of the image, pixels.

    Raises:
        FailedPreconditionError: The image has no such region (`REGION_NOT_FOUND`).
    """
    values = np.asarray(Image.open(io.BytesIO(label_png)).convert("L"))
    cleaned = masks.clean(values)
    names = [name for name in labels if name != BACKGROUND] if wanted == GARMENT else [wanted]
    mask = masks.select(cleaned, labels, names)
    if masks.share(mask) < _LEAST_SHARE:
        found = _regions(cleaned, labels)
        raise FailedPreconditionError(
            f"the image has no {wanted}; it has {', '.join(found) or 'nothing that is known'}",
            reason="REGION_NOT_FOUND",
            metadata={"region": wanted, "regions": ",".join(found)},
        )
    others = [name for name in labels if (name == BACKGROUND) != (wanted == BACKGROUND)]
    neighbour = masks.select(cleaned, labels, others)
    full = _grow(_scale(mask, size), _scale(neighbour, size))
    return Region(wanted, full, masks.share(full))


def _regions(values: npt.NDArray[np.uint8], labels: Sequence[str]) -> list[str]:
    """What could be named instead, largest first; `garment` when there is any part of one."""
    shares = {name: masks.share(masks.select(values, labels, [name])) for name in labels}
    found = sorted((n for n, s in shares.items() if s >= _LEAST_SHARE), key=lambda n: -shares[n])
    return [GARMENT, *found] if any(name != BACKGROUND for name in found) else found


def _scale(mask: BoolArray, size: tuple[int, int]) -> BoolArray:
    """A mask at another size, with smooth outlines."""
    width, height = size
    if mask.shape == (height, width):
        return mask
    soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(soft >= 0.5, dtype=np.bool_)


def _grow(mask: BoolArray, into: BoolArray) -> BoolArray:
    """Take in the blurred pixels at the edge towards `into`, never those of another part."""
    radius = max(1, round(_RIM_SHARE * max(mask.shape)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    grown = cv2.dilate(mask.astype(np.uint8), kernel) != 0
    return np.asarray(mask | (grown & into), dtype=np.bool_)
