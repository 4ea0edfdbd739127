"""Cloth: colour, coverage and surface shading of a fabric at given cloth coordinates."""

import cv2
import numpy as np

from toile.imaging.colours import RGB
from toile.imaging.renderer.geometry import Float32Array
from toile.imaging.renderer.motifs import lace_tile, print_tile, sample_tile
from toile.imaging.renderer.spec import Cloth


def weave(
    cloth: Cloth, u: Float32Array, v: Float32Array, size: int
) -> tuple[Float32Array, Float32Array]:
    """Colour `[H, W, 3]` (0..255) and coverage `[H, W]` (0..1; below 1 only in lace).

    u, v `[H, W]` run across and along the cloth as fractions of the picture's side of `size`
    pixels.
    """
    angle = np.deg2rad(cloth.angle_degrees)
    offset = np.random.default_rng(cloth.seed).random(2)
    across = (u * np.cos(angle) + v * np.sin(angle) + offset[0] * cloth.scale).astype(np.float32)
    along = (v * np.cos(angle) - u * np.sin(angle) + offset[1] * cloth.scale).astype(np.float32)
    if cloth.material == "lace":
        return _lace(cloth, across, along, size)
    colour = _printed(cloth, across, along, size)
    return colour * _surface(cloth, u, v, size)[..., None], np.ones_like(u)


def _flat(colour: RGB, like: Float32Array) -> Float32Array:
    return np.broadcast_to(np.asarray(colour, dtype=np.float32), (*like.shape, 3)).copy()


def _mix(base: Float32Array, colour: RGB | Float32Array, weight: Float32Array) -> Float32Array:
    target = np.asarray(colour, dtype=np.float32)
    mixed: Float32Array = base + weight[..., None] * (target - base)
    return mixed


def _edge(distance: Float32Array, softness: float) -> Float32Array:
    """1 where distance is negative, 0 where positive, softened over `softness`."""
    return np.asarray(np.clip(0.5 - distance / softness, 0, 1), dtype=np.float32)


def _band(position: Float32Array, period: float, share: float, pixel: float) -> Float32Array:
    """Stripes: 1 over `share` of every period."""
    phase = np.abs(np.mod(position / period, 1.0) - 0.5)
    return _edge((phase - share / 2) * period, 1.5 * pixel)


def _printed(cloth: Cloth, u: Float32Array, v: Float32Array, size: int) -> Float32Array:
    base = _flat(cloth.colour, u)
    period, pixel = cloth.scale, 1.0 / size
    if cloth.pattern == "striped":
        return _mix(base, cloth.accent, _band(u, period, 0.36, pixel))
    if cloth.pattern == "dotted":
        row = np.floor(v / period)
        x = (np.mod(u / period + 0.5 * np.mod(row, 2), 1.0) - 0.5) * period
        y = (np.mod(v / period, 1.0) - 0.5) * period
        return _mix(base, cloth.accent, _edge(np.hypot(x, y) - 0.24 * period, 1.5 * pixel))
    if cloth.pattern == "checked":
        weight = 0.46 * (_band(u, period, 0.5, pixel) + _band(v, period, 0.5, pixel))
        return _mix(base, cloth.accent, np.asarray(weight, dtype=np.float32))
    if cloth.pattern == "plaid":
        wide = _band(u, 1.7 * period, 0.34, pixel) + _band(v, 1.7 * period, 0.34, pixel)
        thin = np.maximum(
            _band(u + 0.4 * period, 1.7 * period, 0.08, pixel),
            _band(v + 0.4 * period, 1.7 * period, 0.08, pixel),
        )
        dark = np.asarray(cloth.colour, dtype=np.float32) * 0.45
        fine = np.asarray(0.85 * thin, dtype=np.float32)
        return _mix(_mix(base, dark, 0.42 * wide), cloth.accent, fine)
    if cloth.pattern == "zigzag":
        wave = np.abs(np.mod(u / period, 1.0) - 0.5) * period * 1.1
        return _mix(base, cloth.accent, _band(v + wave, 0.8 * period, 0.38, pixel))
    if cloth.pattern == "floral":
        return _floral(cloth, base, u, v, size)
    return base


def _floral(
    cloth: Cloth, base: Float32Array, u: Float32Array, v: Float32Array, size: int
) -> Float32Array:
    repeat = 4.8 * cloth.scale
    layers = sample_tile(print_tile(cloth.seed), u / repeat, v / repeat, repeat * size) / 255.0
    leaf = (
        (60.0, 110.0, 66.0) if cloth.colour[1] < 120 or cloth.colour[0] > 120 else (190, 214, 150)
    )
    heart = (238.0, 190.0, 60.0) if sum(cloth.accent) > 300 else (250.0, 236.0, 190.0)
    base = _mix(base, np.asarray(leaf, dtype=np.float32), layers[..., 2])
    base = _mix(base, cloth.accent, layers[..., 0])
    return _mix(base, np.asarray(heart, dtype=np.float32), layers[..., 1])


def _surface(cloth: Cloth, u: Float32Array, v: Float32Array, size: int) -> Float32Array:
    """Brightness of the weave itself, about 1."""
    if cloth.material == "denim":
        rng = np.random.default_rng(cloth.seed)
        twill = np.sin(2 * np.pi * (u + 0.6 * v) / 0.017)
        fleck = rng.standard_normal(u.shape).astype(np.float32)
        fleck = cv2.GaussianBlur(fleck, (0, 0), max(0.6, size / 500))
        fleck /= max(1e-6, float(fleck.std()))
        return np.asarray(1.0 + 0.085 * twill + 0.035 * fleck, dtype=np.float32)
    if cloth.material == "knit":
        column = np.mod(u / 0.034, 1.0) - 0.5
        slant = np.mod((v + 0.9 * np.abs(column) * 0.034) / 0.024, 1.0) - 0.5
        groove = np.cos(2 * np.pi * column)
        return np.asarray(
            1.0 + 0.10 * groove - 0.16 * _edge(np.abs(slant) - 0.16, 0.2), dtype=np.float32
        )
    return np.ones_like(u)


def _lace(
    cloth: Cloth, u: Float32Array, v: Float32Array, size: int
) -> tuple[Float32Array, Float32Array]:
    tile = lace_tile(cloth.motif, cloth.seed)
    repeat = cloth.scale
    density = sample_tile(tile, u / repeat, v / repeat, repeat * size)
    raised = cv2.GaussianBlur(density, (0, 0), max(0.5, size / 300))
    relief = np.clip(1.0 + 0.9 * (raised - np.roll(raised, (2, 2), axis=(0, 1))), 0.75, 1.2)
    colour = _flat(cloth.colour, u) * (0.9 + 0.1 * density)[..., None] * relief[..., None]
    coverage = np.clip(0.12 + density, 0.0, 1.0)
    return np.asarray(colour, dtype=np.float32), np.asarray(coverage, dtype=np.float32)
