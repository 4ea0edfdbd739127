"""Giving a region of a picture another colour while its folds, shadows and prints stay.

The region's dominant colour is the cloth. Every pixel is taken for a mixture of cloth under some
light and of something else (a print, a button, the backdrop at the region's edge); the cloth's
share gets the new colour under the same light, the rest stays. So a pixel at the edge, half cloth
and half backdrop, becomes half new cloth and half backdrop.
"""

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from toile.imaging.colours import RGB, dominant_colour, rgb_to_lab
from toile.imaging.masks import feather

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_SAMPLED_SIDE_PIXELS = 512  # the cloth's colour and contrast are measured at most this large
_BAND_ROWS = 256  # rows in hand at a time, so that a large photograph needs little memory
_EDGE_PIXELS = 1.0  # masks end between pixels; a soft rim hides the steps
_RIM_SHARE = 0.02  # of the longer side: how wide the rim is where cloth and surroundings are alike
_ALIKE = 25.0  # CIELAB distance below which a rim pixel cannot be told from the cloth
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
    dye = _measure(image, region, colour)
    weights = feather(region, _edge_pixels(image, region, dye))
    for top in range(0, image.shape[0], _BAND_ROWS):
        rows = slice(top, top + _BAND_ROWS)
        wanted = region[rows]
        if wanted.any():
            pixels = rgb_to_lab(image[rows][wanted])
            share = weights[rows][wanted]
            if keep_prints:
                share = share * dye.cloth_share(pixels)
            mixed = pixels + share[:, None] * (dye.dyed(pixels) - pixels)
            rgb = cv2.cvtColor(mixed.reshape(-1, 1, 3), cv2.COLOR_LAB2RGB).reshape(-1, 3)
            result[rows][wanted] = np.clip(rgb * 255.0, 0, 255).round().astype(np.uint8)
    return result


def _edge_pixels(image: UInt8Array, region: npt.NDArray[np.bool_], dye: "_Dye") -> float:
    """How soft the region's edge must be.

    Where the cloth stands out from what surrounds it, mixed pixels are told apart one by one, and a
    narrow rim does. White cloth before a white wall needs a gentle slope.
    """
    around = cv2.dilate(region.astype(np.uint8), np.ones((5, 5), dtype=np.uint8)) != 0
    outside = image[around & ~region]
    if not outside.size:
        return _EDGE_PIXELS
    contrast = float(np.linalg.norm(rgb_to_lab(np.median(outside, axis=0)) - dye.cloth))
    return _EDGE_PIXELS if contrast > _ALIKE else max(1.0, _RIM_SHARE * max(region.shape))


def _measure(image: UInt8Array, region: npt.NDArray[np.bool_], colour: RGB) -> "_Dye":
    """How to dye a region: measured on a smaller copy."""
    scale = min(1.0, _SAMPLED_SIDE_PIXELS / max(region.shape))
    size = (max(1, round(region.shape[1] * scale)), max(1, round(region.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(region.astype(np.uint8), size, interpolation=cv2.INTER_AREA) != 0
    if not inside.any():  # a region of a few pixels
        small, inside = image, region
    cloth, target = rgb_to_lab(dominant_colour(small, inside)), rgb_to_lab(colour)
    dye = _Dye(cloth, target, 0.0, 100.0)
    pixels = rgb_to_lab(small[inside])
    lightness = pixels[dye.cloth_share(pixels) > 0.5][:, 0]
    low, high = np.percentile(lightness if lightness.size else pixels[:, 0], (2, 98))
    return _Dye(cloth, target, float(low), float(high))


@dataclass(frozen=True)
class _Dye:
    """A change of colour: CIELAB before and after, and the cloth's range of L* before."""

    cloth: Float32Array
    target: Float32Array
    low: float
    high: float

    def cloth_share(self, pixels: Float32Array) -> Float32Array:
        """How much of each pixel `[N, 3]` is cloth, 0..1, by its distance from cloth under light.

        Light moves a colour along the line to black: chroma falls with lightness.
        """
        # Not above 1: what is lighter than the cloth is a mixture with something pale.
        expected = self.cloth[1:] * self._light_before(pixels, most=1.0)
        chroma_distance = np.linalg.norm(pixels[:, 1:] - expected, axis=1)
        chroma = float(np.linalg.norm(self.cloth[1:]))
        reach = max(chroma, 30.0) - _CLOTH_RADIUS
        by_chroma = 1.0 - (chroma_distance - _CLOTH_RADIUS) / reach
        # Only grey cloth needs lightness to be told from a print; coloured cloth may be deep in
        # shade.
        tolerance = _LIGHTNESS_RADIUS + 0.5 * min(chroma, 40.0)
        by_lightness = 1.0 - (np.abs(pixels[:, 0] - self.cloth[0]) - tolerance) / 20.0
        share: Float32Array = np.clip(np.minimum(by_chroma, by_lightness), 0.0, 1.0)
        return share

    def dyed(self, pixels: Float32Array) -> Float32Array:
        """The pixels `[N, 3]` as if they were wholly of the new cloth."""
        lightness = self._move_lightness(pixels[:, 0])
        # A little of the cloth's own variation keeps it from looking painted over.
        grain = pixels[:, 1:] - self.cloth[1:] * self._light_before(pixels, most=1.25)
        chroma = self.target[1:] * self._chroma_share(lightness)[:, None]
        chroma = chroma + 0.5 * np.clip(grain, -8.0, 8.0)
        return np.concatenate([lightness[:, None], chroma], axis=1).astype(np.float32)

    def _light_before(self, pixels: Float32Array, *, most: float) -> Float32Array:
        light: Float32Array = np.clip(pixels[:, :1] / max(float(self.cloth[0]), 8.0), 0.25, most)
        return light

    def _move_lightness(self, lightness: Float32Array) -> Float32Array:
        """L* moved so that the old cloth's becomes the new one's, with what contrast has room.

        Folds of dark cloth hardly show; on light cloth the same folds are plain, so contrast
        grows a little on the way to light and shrinks on the way to dark, as reflected light does.
        """
        before, after = float(self.cloth[0]), float(self.target[0])
        gain = float(np.clip((after / max(before, 5.0)) ** 0.5, 0.4, 1.6))
        down = min(gain, (after - _DARKEST) / max(before - self.low, 1.0))
        up = min(gain, (_LIGHTEST - after) / max(self.high - before, 1.0))
        offset = lightness - before
        moved = after + np.where(offset < 0, down, up) * offset
        limited: Float32Array = np.clip(moved, _DARKEST, _LIGHTEST).astype(np.float32)
        return limited

    def _chroma_share(self, lightness: Float32Array) -> Float32Array:
        """Chroma at some L* as a share of the new cloth's: less in shade and in highlights."""
        after = float(self.target[0])
        shade = np.clip(lightness / max(after, 8.0), 0.3, 1.0)
        shine = np.clip((lightness - after) / max(100.0 - after, 1.0), 0.0, 1.0)
        share: Float32Array = (shade * (1.0 - 0.45 * shine)).astype(np.float32)
        return share
