"""Giving a region of a picture another colour while its folds, shadows and prints stay.

The region's dominant colour is the cloth. Every pixel is taken for a mixture of cloth under some
light and of something else (a print, a button, the backdrop at the region's edge); the cloth's
share gets the new colour under the same light, the rest stays. So a pixel at the edge, half cloth
and half backdrop, becomes half new cloth and half backdrop.
"""

from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from toile.imaging.colours import RGB, dominant_colour, rgb_to_lab
from toile.imaging.masks import feather

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_EDGE_PIXELS = 1.0  # masks end between pixels; a soft rim hides the steps
_DARKEST, _LIGHTEST = 2.0, 98.5  # CIELAB L* that recoloured cloth stays between
_CLOTH_RADIUS = 14.0  # CIELAB distance from the lit cloth within which a pixel is all cloth
_LIGHTNESS_RADIUS = 26.0  # the same for lightness alone: folds are far darker than the cloth


def recolour(
    image: UInt8Array,
    mask: npt.NDArray[np.generic],
    colour: RGB,
    *,
    keep_prints: bool = True,
) -> UInt8Array:
    """Give the cloth in a region a colour; pixels outside the mask are copied unchanged.

    image `[H, W, 3]` sRGB, mask `[H, W]` (non-zero counts), colour the sRGB that the cloth's
    dominant colour becomes. Lightness is shifted as well as hue, and its contrast is compressed
    where the new colour leaves no room, so black cloth can turn white and white cloth black.

    keep_prints: Leave alone what has another colour than the cloth. Without it everything in the
    region is dyed, as lace should be, whose thread and ground are one.
    """
    region = mask != 0
    result = image.copy()
    if not region.any():
        return result
    pixels = rgb_to_lab(image[region])
    cloth, target = rgb_to_lab(dominant_colour(image, mask)), rgb_to_lab(colour)
    share = feather(region, _EDGE_PIXELS)[region][:, None]
    if keep_prints:
        share = share * _cloth_share(pixels, cloth)[:, None]
    lightness = _move_lightness(pixels[:, 0], share[:, 0], float(cloth[0]), float(target[0]))
    recoloured = _recoloured(pixels, lightness, cloth, target)
    mixed = (pixels + share * (recoloured - pixels)).astype(np.float32)
    rgb = cv2.cvtColor(mixed.reshape(-1, 1, 3), cv2.COLOR_LAB2RGB).reshape(-1, 3)
    result[region] = np.clip(rgb * 255.0, 0, 255).round().astype(np.uint8)
    return result


def _cloth_share(pixels: Float32Array, cloth: Float32Array) -> Float32Array:
    """How much of each pixel `[N, 3]` is cloth, 0..1, by its distance from cloth under light.

    Light moves a colour along the line to black: chroma falls with lightness.
    """
    light = np.clip(pixels[:, :1] / max(float(cloth[0]), 8.0), 0.25, 1.25)
    chroma_distance = np.linalg.norm(pixels[:, 1:] - cloth[1:] * light, axis=1)
    lightness_distance = np.abs(pixels[:, 0] - cloth[0])
    chroma = float(np.linalg.norm(cloth[1:]))
    far = max(chroma, 30.0)
    by_chroma = 1.0 - (chroma_distance - _CLOTH_RADIUS) / max(far - _CLOTH_RADIUS, 10.0)
    # Only grey cloth needs lightness to be told from a print; coloured cloth may be deep in shade.
    tolerance = _LIGHTNESS_RADIUS + 0.5 * min(chroma, 40.0)
    by_lightness = 1.0 - (lightness_distance - tolerance) / 20.0
    share: Float32Array = np.clip(np.minimum(by_chroma, by_lightness), 0.0, 1.0)
    return share


def _move_lightness(
    lightness: Float32Array, share: Float32Array, before: float, after: float
) -> Float32Array:
    """Lightness `[N]` moved so that `before` becomes `after`, with what contrast there is room for.

    Folds of dark cloth hardly show; on light cloth the same folds are plain, so contrast grows
    a little on the way to light and shrinks on the way to dark, as the reflected light does.
    """
    cloth = lightness[share > 0.5]
    if not cloth.size:
        cloth = lightness
    low, high = (float(value) for value in np.percentile(cloth, (2, 98)))
    gain = float(np.clip((after / max(before, 5.0)) ** 0.5, 0.4, 1.6))
    down = min(gain, (after - _DARKEST) / max(before - low, 1.0))
    up = min(gain, (_LIGHTEST - after) / max(high - before, 1.0))
    offset = lightness - before
    moved: Float32Array = np.clip(
        after + np.where(offset < 0, down, up) * offset, _DARKEST, _LIGHTEST
    ).astype(np.float32)
    return moved


def _recoloured(
    pixels: Float32Array, lightness: Float32Array, cloth: Float32Array, target: Float32Array
) -> Float32Array:
    """The pixels as if they were wholly of the new cloth."""
    light = _chroma_share(lightness, float(target[0]))[:, None]
    before = np.clip(pixels[:, :1] / max(float(cloth[0]), 8.0), 0.25, 1.25)
    # A little of the cloth's own variation keeps it from looking painted over.
    grain = np.clip(pixels[:, 1:] - cloth[1:] * before, -8.0, 8.0) * 0.5
    chroma = target[1:] * light + grain
    return np.concatenate([lightness[:, None], chroma], axis=1).astype(np.float32)


def _chroma_share(lightness: Float32Array, after: float) -> Float32Array:
    """Chroma of cloth at some lightness as a share of its own: less in shade and in highlights."""
    shade = np.clip(lightness / max(after, 8.0), 0.3, 1.0)
    shine = np.clip((lightness - after) / max(100.0 - after, 1.0), 0.0, 1.0)
    share: Float32Array = (shade * (1.0 - 0.45 * shine)).astype(np.float32)
    return share
