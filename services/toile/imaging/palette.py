"""Holding a picture to a few colours, as a mill does that has so many screens or yarns."""

import re
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from toile.imaging.colour_words import shade_of
from toile.imaging.colours import RGB, rgb_to_lab

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

MOST_COLOURS = 32

_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_BAND_ROWS = 256  # rows in hand at a time: distances to every colour are many times a picture


def parse_colour(text: str) -> RGB | None:
    """The sRGB of `#rrggbb` or of a colour's name; None if it is neither."""
    if _HEX.fullmatch(text.strip()):
        value = int(text.strip()[1:], 16)
        return value >> 16, value >> 8 & 255, value & 255
    shade = shade_of(text)
    return None if shade is None else shade.rgb


def hold_to(image: UInt8Array, colours: Sequence[RGB], strength: float = 1.0) -> UInt8Array:
    """Move each pixel to the palette colour that is nearest in CIELAB.

    Args:
        image: `[H, W, 3]` sRGB.
        colours: One at least.
        strength: At 1 every pixel is a colour of the palette. Below, hue and saturation go this
            share of the way and lightness the square of it, so that folds and shadows outlast
            colours: what looks flat first is the light.
    """
    table = rgb_to_lab(np.asarray(colours, dtype=np.uint8))
    palette = np.asarray(colours, dtype=np.uint8)
    result = np.empty_like(image)
    for top in range(0, image.shape[0], _BAND_ROWS):
        band = image[top : top + _BAND_ROWS]
        pixels = rgb_to_lab(band)
        nearest = _nearest(pixels, table)
        if strength >= 1:
            result[top : top + _BAND_ROWS] = palette[nearest]
            continue
        way = np.array([strength**2, strength, strength], dtype=np.float32)
        moved = pixels + way * (table[nearest] - pixels)
        rgb = cv2.cvtColor(moved, cv2.COLOR_LAB2RGB)
        result[top : top + _BAND_ROWS] = np.clip(rgb * 255, 0, 255).round().astype(np.uint8)
    return result


def _nearest(pixels: Float32Array, table: Float32Array) -> npt.NDArray[np.intp]:
    """Index of the nearest colour for each pixel `[h, W, 3]`."""
    # |p - c|² without |p|², which is the same for all colours.
    scores = (table**2).sum(axis=1) - 2 * (pixels @ table.T)
    return np.asarray(scores.argmin(axis=2))
