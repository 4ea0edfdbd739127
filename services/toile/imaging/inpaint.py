"""Getting a part of a picture ready to be drawn anew: room around it, its edge, what is in it."""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from toile.imaging.masks import Box, bounding_box

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Float32Array: TypeAlias = npt.NDArray[np.float32]

MOST_STRETCHED = 4
"""Longer side of a box as a multiple of the shorter one, as far as the picture has room."""

_BLUR_SHARE = 0.12  # of the region's longer side: only its broad colours are left
_FILL_RADIUS_PIXELS = 3.0
_FILLED_SIDE_PIXELS = 256  # filling is smooth, so a small copy says all there is to say


class Preparation(Enum):
    """What is done to a region before it is drawn."""

    NONE = "NONE"
    GREYSCALE = "GREYSCALE"
    BLUR = "BLUR"
    FILL = "FILL"


@dataclass(frozen=True)
class Border:
    """Room around a picture, in pixels."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


def expand(image: UInt8Array, border: Border) -> UInt8Array:
    """The picture with a border that continues its edge pixels outwards."""
    sides = (border.top, border.bottom, border.left, border.right)
    return np.asarray(cv2.copyMakeBorder(image, *sides, cv2.BORDER_REPLICATE), dtype=np.uint8)


def expand_mask(mask: BoolArray, border: Border) -> BoolArray:
    """The mask of the expanded picture: all of the border is in it."""
    rows, columns = (border.top, border.bottom), (border.left, border.right)
    return np.pad(mask, (rows, columns), constant_values=True)


def fade(mask: BoolArray, width_pixels: float) -> Float32Array:
    """How far a drawing covers what was there, `[H, W]`, 0..1: 1 well inside the mask.

    It falls to 0 across the mask's edge over `width_pixels`, half of them outside, along a
    straight line. Beyond, outside, it is exactly 0.
    """
    if width_pixels <= 0 or mask.all():
        return mask.astype(np.float32)
    inside = mask.astype(np.uint8)
    # Distances are to the nearest pixel of the other side, so the edge itself is half a pixel off.
    outwards = cv2.distanceTransform(1 - inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    inwards = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    depth = np.where(mask, inwards - 0.5, 0.5 - outwards)
    return np.asarray(np.clip(0.5 + depth / width_pixels, 0.0, 1.0), dtype=np.float32)


def box_around(region: BoolArray, padding_pixels: int) -> Box:
    """The part of the picture to draw: the region's box, with padding, within the picture.

    A ribbon is made wider until a base can draw its shape. `region` `[H, W]` is not empty.
    """
    height, width = region.shape
    box = bounding_box(region) or Box(0, 0, width, height)
    left, right = _grown(box.left, box.right, 2 * padding_pixels, width)
    top, bottom = _grown(box.top, box.bottom, 2 * padding_pixels, height)
    least = max(right - left, bottom - top) // MOST_STRETCHED
    left, right = _grown(left, right, least - (right - left), width)
    top, bottom = _grown(top, bottom, least - (bottom - top), height)
    return Box(left, top, right, bottom)


def _grown(start: int, end: int, by: int, limit: int) -> tuple[int, int]:
    if by <= 0:
        return start, end
    return max(0, start - by // 2), min(limit, end + (by + 1) // 2)


def prepare(image: UInt8Array, region: BoolArray, how: Preparation) -> UInt8Array:
    """The picture `[H, W, 3]` with its region made ready; outside it nothing changes."""
    if how is Preparation.NONE:
        return image
    if how is Preparation.GREYSCALE:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        changed = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    elif how is Preparation.BLUR:
        changed = _blurred(image, region)
    else:
        changed = _filled(image, region)
    return np.where(region[..., None], changed, image).astype(np.uint8)


def with_colours_of(drawing: UInt8Array, source: UInt8Array) -> UInt8Array:
    """The drawing's lightness with the source's colours: CIELAB's L of one, a and b of the other.

    Both `[H, W, 3]`, of one size.
    """
    light = cv2.cvtColor(drawing.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    colour = cv2.cvtColor(source.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    mixed = np.concatenate([light[..., :1], colour[..., 1:]], axis=2)
    rgb = cv2.cvtColor(mixed, cv2.COLOR_LAB2RGB)
    return np.asarray(np.clip(rgb * 255, 0, 255).round(), dtype=np.uint8)


def _blurred(image: UInt8Array, region: BoolArray) -> UInt8Array:
    """Blurred by what is in the region alone, so that its surroundings do not bleed in."""
    box = bounding_box(region)
    sigma = max(2.0, _BLUR_SHARE * (max(box.width, box.height) if box else 1))
    inside = region.astype(np.float32)
    total = cv2.GaussianBlur(image.astype(np.float32) * inside[..., None], (0, 0), sigma)
    weight = np.maximum(cv2.GaussianBlur(inside, (0, 0), sigma), 1e-6)
    return np.asarray(np.clip(total / weight[..., None], 0, 255).round(), dtype=np.uint8)


def _filled(image: UInt8Array, region: BoolArray) -> UInt8Array:
    """Filled from the rim inwards by A. Telea's fast marching (J. Graphics Tools 9(1), 2004).

    Where no rim is left to fill from, the region takes the mean colour of the rest.
    """
    height, width = region.shape
    scale = min(1.0, _FILLED_SIDE_PIXELS / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    share = cv2.resize(region.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    touched = (share > 0).astype(np.uint8)
    if touched.all():
        rest = image if region.all() else image[~region]
        mean = rest.reshape(-1, 3).mean(axis=0)
        return np.broadcast_to(mean.round().astype(np.uint8), image.shape)
    filled = cv2.inpaint(small, 255 * touched, _FILL_RADIUS_PIXELS, cv2.INPAINT_TELEA)
    full = cv2.resize(filled, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(full, dtype=np.uint8)
