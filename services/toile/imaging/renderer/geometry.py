"""Outlines as smooth closed curves, and their rasterised masks."""

from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Points: TypeAlias = npt.NDArray[np.float64]
Point: TypeAlias = Sequence[float] | Points
Float32Array: TypeAlias = npt.NDArray[np.float32]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]

_SUBPIXEL_BITS = 4


def bezier(start: Point, control: Point, end: Point) -> Points:
    """Twelve points of a quadratic Bezier curve, its end left out so that curves chain."""
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    a, b, c = (np.asarray(point, dtype=float) for point in (start, control, end))
    points: Points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    return points


def chain(*pieces: Sequence[Point] | Points) -> Points:
    """Curves and corner points joined into one outline `[N, 2]`."""
    return np.concatenate([np.asarray(piece, dtype=float).reshape(-1, 2) for piece in pieces])


def mirrored(right_half: Points) -> Points:
    """A closed outline from its right half, listed from the top centre to the bottom centre."""
    left = right_half[::-1] * np.array([-1.0, 1.0])
    return np.concatenate([right_half, left])


def flip(points: Points) -> Points:
    """The same points on the other side of the garment's axis."""
    flipped: Points = points * np.array([-1.0, 1.0])
    return flipped


def ellipse(centre: Sequence[float], radius_x: float, radius_y: float) -> Points:
    """A closed ellipse of 64 points."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack(
        [centre[0] + radius_x * np.cos(angles), centre[1] + radius_y * np.sin(angles)], axis=1
    )


def fill_mask(outline: Points, size: int) -> UInt8Array:
    """Anti-aliased mask `[size, size]` of an outline in pixels."""
    mask = np.zeros((size, size), dtype=np.uint8)
    fixed = np.round(outline * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return mask


def line_mask(line: Points, size: int, width: float, *, dashed: bool = False) -> UInt8Array:
    """Anti-aliased mask of an open line in pixels, `width` pixels wide."""
    mask = np.zeros((size, size), dtype=np.uint8)
    thickness = max(1, round(width))
    for piece in _dashes(line, 4.0 * thickness) if dashed else [line]:
        fixed = np.round(piece * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.polylines(mask, [fixed], False, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    if width < 1.0:
        mask = (mask * width).astype(np.uint8)
    return mask


def _dashes(line: Points, length: float) -> list[Points]:
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    cuts = np.arange(0.0, along[-1], length)
    pieces = []
    for begin in cuts:
        ends = np.clip([begin, begin + 0.6 * length], 0, along[-1])
        pieces.append(np.stack([np.interp(ends, along, line[:, axis]) for axis in (0, 1)], axis=1))
    return pieces


def smooth_noise(
    rng: np.random.Generator, size: int, cells_x: float, cells_y: float
) -> Float32Array:
    """Smooth noise `[size, size]` of about unit variance with so many cells a side."""
    grid = rng.standard_normal((max(2, round(cells_y)) + 2, max(2, round(cells_x)) + 2))
    noise = cv2.resize(grid.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(noise, dtype=np.float32)
