"""Sizes that images keep their shape in."""

import numpy as np
import pytest
from PIL import Image

from toile.imaging.buckets import bucket_crop, bucket_sizes, bucket_step, nearest_bucket


@pytest.mark.parametrize(("side", "step"), [(128, 32), (512, 32), (1024, 64)])
def test_buckets_have_about_the_area_of_the_square(side: int, step: int) -> None:
    assert bucket_step(side) == step
    sizes = bucket_sizes(side)
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes) > 2
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= side * side < (width + step) * (height + step)
        assert max(width, height) <= 2 * min(width, height)
        assert (height, width) in sizes


def test_those_of_1024_pixels_are_sdxls_own() -> None:
    published = {(1024, 1024), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)}
    assert published <= set(bucket_sizes(1024))


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((300, 300), (128, 128)),
        ((400, 533), (96, 160)),
        ((533, 400), (160, 96)),
        ((110, 100), (128, 128)),
        ((5000, 10), (160, 96)),
    ],
)
def test_an_image_goes_where_it_loses_least(
    image: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert nearest_bucket(image, 128) == bucket


def test_the_middle_is_kept_and_where_it_was_is_told() -> None:
    pixels = np.zeros((600, 800, 3), np.uint8)
    pixels[:, 300:500] = 255
    cropped, (left, top) = bucket_crop(Image.fromarray(pixels), (96, 160))
    assert cropped.size == (96, 160)
    assert (left, top) == ((round(800 * 160 / 600) - 96) // 2, 0)
    row = np.asarray(cropped)[80, :, 0]
    lit = np.flatnonzero(row > 127)
    assert (lit[0], lit[-1] + 1) == pytest.approx(
        (300 * 160 / 600 - left, 500 * 160 / 600 - left), abs=1
    )
    larger, offsets = bucket_crop(Image.new("RGB", (48, 80), "red"), (96, 160))
    assert (larger.size, offsets) == ((96, 160), (0, 0))
