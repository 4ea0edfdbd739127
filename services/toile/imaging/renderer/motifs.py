"""Flowers: printed bouquets and lace tiles, drawn once and repeated without a seam."""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from toile.imaging.renderer.geometry import Float32Array, Points, UInt8Array

TILE = 384
"""Side of a drawn tile in pixels; it is shrunk to the size its repeat has in the picture."""

_VARIANTS = 6
_SHIFT = 4


def _fixed(points: Points) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(np.round(points * 2**_SHIFT), dtype=np.int32)


class _Tile:
    """A periodic drawing surface: every shape is drawn at its nine wrapped places."""

    def __init__(self) -> None:
        self.surface = np.zeros((TILE, TILE), dtype=np.uint8)

    def _wrapped(self, points: Points) -> list[Points]:
        low, high = points.min(axis=0) - 12, points.max(axis=0) + 12
        shifts = [(x, y) for x in (-TILE, 0, TILE) for y in (-TILE, 0, TILE)]
        return [
            points + np.array(shift)
            for shift in shifts
            if np.all(high + shift >= 0) and np.all(low + shift <= TILE)
        ]

    def fill(self, points: Points, value: int) -> None:
        for wrapped in self._wrapped(points):
            cv2.fillPoly(self.surface, [_fixed(wrapped)], value, cv2.LINE_AA, _SHIFT)

    def line(self, points: Points, value: int, width: int, *, closed: bool = False) -> None:
        for wrapped in self._wrapped(points):
            cv2.polylines(
                self.surface, [_fixed(wrapped)], closed, value, width, cv2.LINE_AA, _SHIFT
            )


def petal(centre: Points, angle: float, length: float, width: float, tip: float = 0.0) -> Points:
    """A petal or leaf outline that starts at `centre`; tip 0 is round, 1 pointed."""
    t = np.linspace(0, np.pi, 16)
    along = length * (1 - np.cos(t)) / 2
    across = width * np.sin(t) ** (1 + tip) / 2
    shape = np.concatenate(
        [np.stack([along, across], 1), np.stack([along[::-1], -across[::-1]], 1)]
    )
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    placed: Points = centre + shape @ turn
    return placed


def ring(centre: Points, radius: float) -> Points:
    """A circle of 28 points."""
    angles = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    placed: Points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return placed


def _flower(
    tile: _Tile, centre: Points, radius: float, turn: float, petals: int, width: float, tip: float
) -> None:
    for index in range(petals):
        angle = turn + 2 * np.pi * index / petals
        outline = petal(centre, angle, radius, radius * width, tip)
        tile.fill(outline, 235)
        tile.line(outline, 255, 5, closed=True)
        tile.fill(petal(centre, angle, radius * 0.62, radius * width * 0.22, tip), 130)
    tile.fill(ring(centre, radius * 0.24), 255)
    tile.line(ring(centre, radius * 0.13), 60, 4, closed=True)


def _rosette(tile: _Tile, centre: Points, radius: float, turn: float) -> None:
    """A full rose: scalloped rings inside one another around a spiral heart."""
    for ring_index, share in enumerate((1.0, 0.74, 0.5)):
        count = 9 - 2 * ring_index
        angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        lobes = np.abs(np.sin(count * (angles + turn + ring_index) / 2))
        radii = radius * share * (0.84 + 0.16 * lobes)
        outline = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        tile.fill(outline, (235, 120, 235)[ring_index])
        tile.line(outline, 255, 6, closed=True)
    spiral = np.linspace(0, 5 * np.pi, 60)
    radii = radius * 0.32 * spiral / spiral[-1]
    points = centre + radii[:, None] * np.stack([np.cos(spiral + turn), np.sin(spiral + turn)], 1)
    tile.fill(ring(centre, radius * 0.34), 90)
    tile.line(points, 255, 5)


def _tulip(tile: _Tile, centre: Points, radius: float, turn: float) -> None:
    base = centre - 0.5 * radius * np.array([np.cos(turn), np.sin(turn)])
    for offset in (-0.5, 0.5, 0.0):
        outline = petal(base, turn + offset, 1.5 * radius, 0.62 * radius, 0.7)
        tile.fill(outline, 235)
        tile.line(outline, 255, 5, closed=True)
        tile.fill(petal(base, turn + offset, radius, 0.16 * radius, 0.5), 90)
    tile.fill(ring(base, 0.2 * radius), 255)


def _stem(tile: _Tile, start: Points, end: Points, bend: float, leaf: float) -> None:
    t = np.linspace(0, 1, 24)[:, None]
    normal = np.array([-(end - start)[1], (end - start)[0]])
    points = start + t * (end - start) + bend * np.sin(np.pi * t) * normal
    tile.line(points, 250, 9)
    heading = float(np.arctan2(*(end - start)[::-1]))
    for position, side in ((7, 1.0), (13, -1.0), (18, 1.0)):
        outline = petal(points[position], heading + side * 0.9, leaf, 0.42 * leaf, 0.6)
        tile.fill(outline, 225)
        tile.line(outline, 250, 4, closed=True)


def _net(tile: _Tile, cells: int, width: int) -> None:
    """A diamond net with a whole number of cells, so that it closes on itself."""
    step = TILE / cells
    for index in range(-cells, 2 * cells):
        offset = index * step
        for slope in (1, -1):
            begin = np.array([-TILE, offset - slope * TILE], dtype=float)
            end = np.array([2 * TILE, offset + slope * 2 * TILE], dtype=float)
            cv2.line(
                tile.surface,
                tuple(int(v) for v in begin),
                tuple(int(v) for v in end),
                140,
                width,
                cv2.LINE_AA,
            )


def _place_main(tile: _Tile, motif: str, rng: np.random.Generator) -> None:
    turn = float(rng.uniform(0, 2 * np.pi))
    first = TILE * rng.uniform(0.26, 0.34, 2)
    second = first + TILE / 2
    radius = TILE * float(rng.uniform(0.21, 0.25))
    draw: dict[str, Callable[[Points, float], None]] = {
        "daisy": lambda c, r: _flower(tile, c, r, turn, 8, 0.5, 0.0),
        "blossom": lambda c, r: _flower(tile, c, r, turn, 5, 0.95, 0.0),
        "leaf": lambda c, r: _flower(tile, c, r, turn, 6, 0.4, 0.9),
        "tulip": lambda c, r: _tulip(tile, c, r, turn if r > 0.15 * TILE else -turn),
        "rosette": lambda c, r: _rosette(tile, c, r, turn),
    }
    wrap = np.array([TILE, 0.0])
    leaf = TILE * 0.15
    _stem(tile, first, second, 0.28, leaf)
    _stem(tile, second, first + wrap, -0.28, leaf)
    _stem(tile, first, second - wrap, 0.3, leaf)
    draw[motif](first, radius)
    draw[motif](second, radius * (0.82 if motif != "rosette" else 0.62))


@lru_cache(maxsize=64)
def lace_tile(motif: str, variant: int) -> Float32Array:
    """Thread density `[TILE, TILE]` in 0..1 of one lace repeat: net ground, stems and motifs."""
    rng = np.random.default_rng([variant % _VARIANTS, sum(motif.encode())])
    tile = _Tile()
    _net(tile, int(rng.integers(12, 16)), 4)
    _place_main(tile, motif, rng)
    return np.asarray(tile.surface, dtype=np.float32) / 255.0


@lru_cache(maxsize=32)
def print_tile(variant: int) -> UInt8Array:
    """A floral print `[TILE, TILE, 3]`: masks of petals, hearts and leaves, 0..255."""
    rng = np.random.default_rng([variant % _VARIANTS, 77])
    layers = [_Tile(), _Tile(), _Tile()]
    places = [(0.25, 0.25, 0.19), (0.75, 0.72, 0.17), (0.74, 0.2, 0.1), (0.24, 0.74, 0.11)]
    for x, y, radius in places:
        centre = TILE * (np.array([x, y]) + rng.normal(0, 0.02, 2))
        turn, size = float(rng.uniform(0, 2 * np.pi)), TILE * radius
        for side in (0.4, 2.4, 4.4):
            layers[2].fill(petal(centre, turn + side, 1.65 * size, 0.5 * size, 0.5), 255)
        petals = int(rng.integers(5, 7))
        for index in range(petals):
            outline = petal(centre, turn + 2 * np.pi * index / petals, size, 0.85 * size)
            layers[0].fill(outline, 255)
            layers[0].line(outline, 190, 4, closed=True)
        layers[1].fill(ring(centre, 0.28 * size), 255)
    return np.stack([layer.surface for layer in layers], axis=2)


def sample_tile(tile: np.ndarray, u: Float32Array, v: Float32Array, pixels: float) -> Float32Array:
    """A tile laid over coordinates counted in repeats; one repeat covers so many pixels."""
    side = int(np.clip(round(pixels), 16, TILE))
    small = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
    map_x = np.mod(u, 1.0) * side
    map_y = np.mod(v, 1.0) * side
    laid = cv2.remap(
        small,
        map_x.astype(np.float32),
        map_y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    return np.asarray(laid, dtype=np.float32)
