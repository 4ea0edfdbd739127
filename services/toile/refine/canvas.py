"""The pixels of an edit: what the models are given, and how their drawing comes back.

The drawing is made at the base's own size and laid over the source at the source's size, inside
the region only: outside it every pixel keeps its value, whatever the models did there.
"""

import io
import math
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from toile.imaging import masks
from toile.refine.regions import BoolArray

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

_GRID = 8  # pixels of one latent
_LEAST_SIDE = 64
_BAND_ROWS = 256  # rows in hand at a time, so that a large photograph needs little memory


def drawing_size(width: int, height: int, native_size: int) -> tuple[int, int]:
    """Width and height to draw at: the image's shape, the base's own area, multiples of 8."""
    scale = native_size / math.sqrt(width * height)
    longest = 2 * native_size  # a ribbon would leave the base's range
    return _snap(min(width * scale, longest)), _snap(min(height * scale, longest))


def _snap(side: float) -> int:
    return max(_LEAST_SIDE, round(side / _GRID) * _GRID)


def drawing_input(image: UInt8Array, mask: BoolArray, size: tuple[int, int]) -> tuple[bytes, bytes]:
    """Image and mask as PNG at the size of the drawing.

    The mask is widened by one latent, or the models would keep the old colour around its edge;
    laying over by the exact mask takes that back.
    """
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    share = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    wide = cv2.dilate(
        (share > 0).astype(np.uint8) * 255, np.ones((_GRID + 1, _GRID + 1), dtype=np.uint8)
    )
    return encode(small), encode(np.asarray(wide, dtype=np.uint8))


def lay_over(
    source: UInt8Array,
    ground: UInt8Array,
    drawing: UInt8Array,
    mask: BoolArray,
    *,
    keep_detail: bool,
) -> UInt8Array:
    """The source with the drawing inside the mask; outside it, bit for bit the source.

    Args:
        source: `[H, W, 3]`, the image as it was.
        ground: `[H, W, 3]`, what shows at the mask's edge, where the drawing fades out.
        drawing: `[h, w, 3]`, at the size it was drawn.
        mask: `[H, W]`, where pixels may change.
        keep_detail: Add the detail of `ground` that is too fine for the drawing's size; for
            edits that keep the structure.
    """
    height, width = mask.shape
    fade = masks.feather(mask, max(1.0, 0.006 * min(height, width)))
    coarse = cv2.resize(ground, drawing.shape[1::-1], interpolation=cv2.INTER_AREA)
    result = source.copy()
    for top in range(0, height, _BAND_ROWS):
        rows = slice(top, min(top + _BAND_ROWS, height))
        inside = mask[rows]
        if not inside.any():
            continue
        drawn = _band(drawing, rows, (width, height))
        under = ground[rows].astype(np.float32)
        if keep_detail:
            drawn = drawn + under - _band(coarse, rows, (width, height))
        weight = fade[rows][..., None]
        mixed = np.clip(under + weight * (drawn - under), 0, 255).round().astype(np.uint8)
        result[rows][inside] = mixed[inside]
    return result


def _band(image: UInt8Array, rows: slice, size: tuple[int, int]) -> npt.NDArray[np.float32]:
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


def encode(pixels: UInt8Array) -> bytes:
    """Pixels as PNG, quickly: it is read once and thrown away."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt8Array:
    """The pixels `[H, W, 3]` of a PNG that the models made."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
