"""Label maps and masks: clean-up, selection, feathering, extent."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; right and bottom are just outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.bottom - self.top


def clean(labels: UInt8Array, *, least_share: float = 0.002) -> UInt8Array:
    """Remove specks from a label map `[H, W]`.

    A connected piece smaller than `least_share` of the image takes the label of what is nearest
    to it. An image in which every piece is small is returned as it is.
    """
    least = max(1, round(least_share * labels.size))
    specks = np.zeros(labels.shape, dtype=bool)
    for label in np.unique(labels):
        _, pieces, stats, _ = cv2.connectedComponentsWithStats(
            (labels == label).astype(np.uint8), connectivity=4
        )
        small = stats[:, cv2.CC_STAT_AREA] < least
        small[0] = False
        specks |= small[pieces]
    if not specks.any() or specks.all():
        return labels.copy()
    _, nearest = cv2.distanceTransformWithLabels(
        specks.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    table = np.zeros(int(nearest.max()) + 1, dtype=np.uint8)
    table[nearest[~specks]] = labels[~specks]
    return np.where(specks, table[nearest], labels).astype(np.uint8)


def select(labels: UInt8Array, names: Sequence[str], wanted: Collection[str]) -> BoolArray:
    """The pixels of the wanted parts; `names[v]` is the part of value `v`."""
    values = [value for value, name in enumerate(names) if name in wanted]
    return np.asarray(np.isin(labels, values))


def feather(mask: npt.NDArray[np.generic], radius_pixels: float) -> Float32Array:
    """Soft weights 0..1 of a mask `[H, W]`: 1 well inside, 0 outside, rising over the radius.

    Nothing outside the mask is touched, so that blending by it leaves those pixels alone.
    """
    inside = (mask != 0).astype(np.uint8)
    if radius_pixels <= 0:
        return np.asarray(inside, np.float32)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    weights = np.clip(distance / (radius_pixels + 1.0), 0.0, 1.0)
    return np.asarray(weights, np.float32)


def bounding_box(mask: npt.NDArray[np.generic]) -> Box | None:
    """The smallest box around the mask's non-zero pixels; None when there are none."""
    rows = np.flatnonzero((mask != 0).any(axis=1))
    columns = np.flatnonzero((mask != 0).any(axis=0))
    if not rows.size:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def share(mask: npt.NDArray[np.generic]) -> float:
    """The share of non-zero pixels, 0..1."""
    return float((mask != 0).mean()) if mask.size else 0.0
