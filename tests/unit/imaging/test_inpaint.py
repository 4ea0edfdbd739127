import io

import numpy as np
import pytest
from PIL import Image

from toile.imaging.canvas import decode_png, drawing_input, drawing_size, encode, lay_over
from toile.imaging.colours import rgb_to_lab
from toile.imaging.inpaint import (
    Border,
    Preparation,
    box_around,
    expand,
    expand_mask,
    fade,
    prepare,
    with_colours_of,
)


def noise(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8)


def square(height: int = 60, width: int = 80) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[20:40, 30:50] = True
    return mask


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((100, 100), (128, 128)),
        ((3000, 4000), (112, 144)),
        ((4000, 1000), (256, 64)),
        ((4000, 10), (256, 64)),
        ((10, 4000), (64, 256)),
    ],
)
def test_a_drawing_has_the_pictures_shape_and_the_bases_area(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    assert drawing_size(*shape, 128) == size


def test_a_drawing_shows_where_its_weight_is_and_nowhere_else() -> None:
    source, mask = noise(), square()
    weights = fade(mask, 6)
    laid = lay_over(source, source, np.zeros((32, 40, 3), np.uint8), weights)
    assert (laid[weights == 0] == source[weights == 0]).all()
    assert (laid[weights == 1] == 0).all()


def test_a_fade_is_as_wide_as_it_is_told_and_centred_on_the_edge() -> None:
    mask = square()
    row = fade(mask, 8)[30]
    assert (np.diff(row[20:40]) >= 0).all()
    rising = np.flatnonzero((row[:40] > 0) & (row[:40] < 1))
    assert rising.tolist() == list(range(26, 34))
    assert row[29] + row[30] == pytest.approx(1)
    assert (fade(mask, 0) == mask).all()
    assert (fade(np.ones((4, 4), bool), 9) == 1).all()


def test_a_border_continues_the_edge_and_is_drawn() -> None:
    image, border = noise(), Border(left=8, top=0, right=16, bottom=24)
    wide = expand(image, border)
    mask = expand_mask(np.zeros((60, 80), bool), border)
    assert wide.shape == (84, 104, 3)
    assert (wide[:60, 8:88] == image).all()
    assert (wide[:60, :8] == image[:, :1]).all()
    assert not mask[:60, 8:88].any()
    assert mask.sum() == 84 * 104 - 60 * 80


def test_a_box_holds_the_region_with_padding_and_stays_in_the_picture() -> None:
    box = box_around(square(), 4)
    assert (box.left, box.top, box.right, box.bottom) == (26, 16, 54, 44)
    whole = box_around(square(), 500)
    assert (whole.left, whole.top, whole.right, whole.bottom) == (0, 0, 80, 60)
    ribbon = np.zeros((200, 200), bool)
    ribbon[100, :] = True
    box = box_around(ribbon, 0)
    assert (box.width, box.height) == (200, 50)


@pytest.mark.parametrize("how", Preparation)
def test_preparing_changes_the_region_only(how: Preparation) -> None:
    image, mask = noise(), square()
    made = prepare(image, mask, how)
    assert (made[~mask] == image[~mask]).all()
    assert (made[mask] == image[mask]).all() == (how is Preparation.NONE)


def test_what_each_preparation_leaves() -> None:
    image, mask = noise(), square()
    image[mask] = np.where(np.arange(400)[:, None] % 2, (200, 10, 10), (90, 10, 10))
    image[~mask] = (10, 10, 220)
    grey = prepare(image, mask, Preparation.GREYSCALE)[mask]
    assert (grey == grey[:, :1]).all()
    assert len(np.unique(grey)) > 1
    blurred = prepare(image, mask, Preparation.BLUR)[mask].astype(int)
    assert np.abs(blurred - (145, 10, 10)).max() < 12  # its own colours, not its surroundings'
    filled = prepare(image, mask, Preparation.FILL)[mask].astype(int)
    assert np.abs(filled - (10, 10, 220)).max() < 4


def test_filling_everything_leaves_a_plain_colour() -> None:
    image = noise()
    filled = prepare(image, np.ones((60, 80), bool), Preparation.FILL)
    assert np.ptp(filled.reshape(-1, 3), axis=0).max() == 0


def test_light_of_one_picture_and_colours_of_another() -> None:
    drawing, source = noise() // 4 + 90, np.full((60, 80, 3), (150, 110, 100), np.uint8)
    lab = rgb_to_lab(with_colours_of(drawing, source))
    assert np.abs(lab[..., 1:] - rgb_to_lab(source)[..., 1:]).max() < 2
    assert np.abs(lab[..., 0] - rgb_to_lab(drawing)[..., 0]).max() < 2


def test_the_models_get_a_mask_a_little_wider_than_the_region() -> None:
    image, mask = drawing_input(noise(), square(), (160, 120))
    assert decode_png(image).shape == (120, 160, 3)
    with Image.open(io.BytesIO(mask)) as wide:
        assert wide.mode == "L"
        rows = np.flatnonzero(np.asarray(wide).any(axis=1))
    assert (rows[0], rows[-1]) == (36, 83)


def test_png_there_and_back() -> None:
    assert (decode_png(encode(noise())) == noise()).all()
