"""Aspect buckets: the sizes that images keep their shape in, near a base's own area.

As kohya's trainers make them (`make_bucket_resolutions`): sides are multiples of a step, the area
is at most the square's. Those of a side of 1024 pixels are in the list that SDXL was trained on
(Podell et al., "SDXL", 2023, appendix I), but for its longest.
"""

import math

import cv2
import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height, pixels."""

SQUARE, KEEP = ASPECTS = ("square", "keep")
"""What a dataset version's images are: cropped to squares, or brought into buckets."""

MAX_RATIO = 2.0
_STEP, _SMALL_STEP = 64, 32
"""SDXL's own, and for small bases what its autoencoder (8) and its UNet (4) divide sides by."""
_LARGE_SIDE = 1024


def bucket_step(side: int) -> int:
    """What sides of buckets are multiples of, for squares of a side."""
    return _STEP if side >= _LARGE_SIDE else _SMALL_STEP


def bucket_sizes(side: int) -> list[Size]:
    """Return the buckets beside squares of `side` pixels, a multiple of `bucket_step`; sorted."""
    step = bucket_step(side)
    wide = [
        (width, side * side // width // step * step)
        for width in range(side, math.isqrt(int(MAX_RATIO * side * side)) + 1, step)
    ]
    wide = [(width, height) for width, height in wide if width <= MAX_RATIO * height]
    return sorted({*wide, *((height, width) for width, height in wide)})


def nearest_bucket(image_size: Size, side: int) -> Size:
    """Return the bucket whose shape is most like an image's, the larger of equals."""
    ratio = math.log(image_size[0] / image_size[1])

    def distance(bucket: Size) -> tuple[float, int]:
        width, height = bucket
        return round(abs(math.log(width / height) - ratio), 9), -width * height

    return min(bucket_sizes(side), key=distance)


def bucket_crop(image: Image.Image, size: Size) -> tuple[Image.Image, tuple[int, int]]:
    """Scale an RGB image until it covers a size, and cut that out of its middle.

    By area when it shrinks, bicubic when it grows.

    Returns:
        The image, and the left and the top of the cut in the scaled image.
    """
    width, height = size
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    pixels = cv2.resize(np.asarray(image, np.uint8), scaled, interpolation=method)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return Image.fromarray(pixels[top : top + height, left : left + width]), (left, top)
