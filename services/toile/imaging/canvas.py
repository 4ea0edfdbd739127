"""Drawing on a part of a picture: what the models are given, and how their drawing comes back.

The drawing is made at the base's own size and laid over the picture at the picture's size, inside
a region only: outside it every pixel keeps its value, whatever the models did there.
"""

import io
import math
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Float32Array: TypeAlias = npt.NDArray[np.float32]

GRID = 8  # pixels of one latent
SIZE_FACTOR = 2
"""Sides may be down to a half of a base's native size and up to twice it."""

_BAND_ROWS = 256  # rows in hand at a time, so that a large photograph needs little memory


def drawing_size(width: int, height: int, native_size: int) -> tuple[int, int]:
    """Width and height to draw at: the picture's shape, the base's own area, multiples of 8.

    A picture over four times as long as it is wide is drawn squeezed: no base draws such a ribbon.
    """
    scale = native_size / math.sqrt(width * height)
    return _snap(width * scale, native_size), _snap(height * scale, native_size)


def _snap(side: float, native_size: int) -> int:
    low, high = native_size / SIZE_FACTOR, native_size * SIZE_FACTOR
    return round(min(max(side, low), high) / GRID) * GRID


def resized(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """The picture at another width and height: by area when it shrinks, bicubic when it grows."""
    if size == image.shape[1::-1]:
        return image
    grows = size[0] * size[1] > image.shape[0] * image.shape[1]
    method = cv2.INTER_CUBIC if grows else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, size, interpolation=method), dtype=np.uint8)


def drawing_input(image: UInt8Array, mask: BoolArray, size: tuple[int, int]) -> tuple[bytes, bytes]:
    """Image and mask as PNG at the size of the drawing.

    The mask is widened by one latent, or the models would keep the old colour around its edge;
    laying over by the exact mask takes that back.
    """
    share = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    wide = cv2.dilate(
        (share > 0).astype(np.uint8) * 255, np.ones((GRID + 1, GRID + 1), dtype=np.uint8)
    )
    return encode(resized(image, size)), encode(np.asarray(wide, dtype=np.uint8))


def lay_over(
    source: UInt8Array,
    ground: UInt8Array,
    drawing: UInt8Array,
    weights: Float32Array,
    *,
    keep_detail: bool = False,
) -> UInt8Array:
    """The source with the drawing where weights are above 0; elsewhere, bit for bit the source.

    Args:
        source: `[H, W, 3]`, the picture as it was.
        ground: `[H, W, 3]`, what shows where the drawing fades out.
        drawing: `[h, w, 3]`, at the size it was drawn.
        weights: `[H, W]`, 0..1: how far the drawing covers the ground.
        keep_detail: Add the detail of `ground` that is too fine for the drawing's size; for
            edits that keep the structure.
    """
    height, width = weights.shape
    coarse = cv2.resize(ground, drawing.shape[1::-1], interpolation=cv2.INTER_AREA)
    result = source.copy()
    for top in range(0, height, _BAND_ROWS):
        rows = slice(top, min(top + _BAND_ROWS, height))
        inside = weights[rows] > 0
        if not inside.any():
            continue
        drawn = _band(drawing, rows, (width, height))
        under = ground[rows].astype(np.float32)
        if keep_detail:
            drawn = drawn + under - _band(coarse, rows, (width, height))
        weight = weights[rows][..., None]
        mixed = np.clip(under + weight * (drawn - under), 0, 255).round().astype(np.uint8)
        result[rows][inside] = mixed[inside]
    return result


def _band(image: UInt8Array, rows: slice, size: tuple[int, int]) -> Float32Array:
    """Some rows of an image enlarged to `size`, without enlarging all of it."""
    width, height = size
    scale_x, scale_y = image.shape[1] / width, image.shape[0] / height
    if scale_x >= 1 and scale_y >= 1:  # the image is no larger than the drawing, so small
        shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return np.asarray(shrunk[rows], dtype=np.float32)
    # Pixel centres: target (x + 0.5) * scale - 0.5 in the source.
    shift_x, shift_y = 0.5 * scale_x - 0.5, (rows.start + 0.5) * scale_y - 0.5
    matrix = np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]], dtype=np.float32)
    band = cv2.warpAffine(
        image.astype(np.float32),
        matrix,
        (width, rows.stop - rows.start),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(band, dtype=np.float32)


def thumbnail(pixels: UInt8Array, side_pixels: int) -> bytes:
    """A copy as PNG, no wider or higher than so many pixels: for who only looks at it."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side_pixels, side_pixels), Image.Resampling.LANCZOS)
    return encode(np.asarray(picture, dtype=np.uint8))


def encode(pixels: UInt8Array) -> bytes:
    """Pixels as PNG, quickly: it is read once and thrown away."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt8Array:
    """The pixels `[H, W, 3]` of a PNG that the models made."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
