"""Crops, masks, edges and near-duplicates."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from toile.imaging import masks
from toile.imaging.crop import square_crop, subject_square
from toile.imaging.edges import canny
from toile.imaging.masks import Box
from toile.imaging.similarity import group_near_duplicates, perceptual_hash
from unit.imaging.files import picture


def on_paper(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A red block on off-white paper with a little noise."""
    noise = np.random.default_rng(0).integers(-4, 5, (size[1], size[0], 3))
    image = Image.fromarray((np.full((size[1], size[0], 3), 238) + noise).astype(np.uint8))
    ImageDraw.Draw(image).rectangle(box, fill=(190, 30, 40))
    return image


@pytest.mark.parametrize(
    ("size", "subject"),
    [
        ((800, 400), (560, 150, 700, 260)),
        ((400, 800), (60, 560, 260, 700)),
        ((900, 900), (80, 80, 240, 200)),
    ],
)
def test_the_square_holds_the_subject(
    size: tuple[int, int], subject: tuple[int, int, int, int]
) -> None:
    box = subject_square(on_paper(size, subject), least_side=128)
    assert box.width == box.height
    assert box.left <= subject[0]
    assert box.top <= subject[1]
    assert box.right >= subject[2]
    assert box.bottom >= subject[3]
    assert box.width < 0.75 * min(size), "it comes closer"
    assert 0 <= box.left < box.right <= size[0]
    assert 0 <= box.top < box.bottom <= size[1]


def test_a_swatch_is_cropped_at_its_centre() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 500, 3)).astype(np.uint8)
    assert subject_square(Image.fromarray(pixels)) == Box(100, 0, 400, 300)
    assert subject_square(Image.new("RGB", (500, 300), "white")) == Box(100, 0, 400, 300)


def test_a_subject_taller_than_the_picture_is_wide_keeps_its_middle() -> None:
    box = subject_square(on_paper((300, 600), (100, 20, 200, 580)))
    assert box == Box(0, box.top, 300, box.top + 300)
    assert abs(box.top - 150) < 30


def test_crops_are_repeatable_and_never_enlarge_a_detail() -> None:
    image = on_paper((800, 800), (300, 300, 440, 440))
    assert subject_square(image, least_side=256).width == 256
    assert square_crop(image, 128).tobytes() == square_crop(image, 128).tobytes()
    assert square_crop(picture(40, 30), 64).size == (64, 64)


def test_shrinking_averages() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = np.asarray(square_crop(Image.fromarray(stripes), 64), int)
    assert np.abs(shrunk - 127.5).max() <= 1, "no moiré"


def test_specks_take_the_label_around_them() -> None:
    labels = np.zeros((100, 100), np.uint8)
    labels[20:80, 20:80] = 2
    labels[50, 50] = 5
    labels[5, 5] = 3
    cleaned = masks.clean(labels)
    assert cleaned[50, 50] == 2
    assert cleaned[5, 5] == 0
    assert (cleaned == 2).sum() == 3600
    assert labels[50, 50] == 5, "the argument is left alone"


def test_a_map_of_nothing_but_specks_is_kept() -> None:
    noise = np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8)
    assert np.array_equal(masks.clean(noise, least_share=0.5), noise)


def test_parts_are_selected_by_name() -> None:
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    names = ("background", "body", "sleeves")
    assert masks.select(labels, names, {"body", "collar"}).tolist() == [
        [False, True],
        [False, True],
    ]
    assert not masks.select(labels, names, {"collar"}).any()


def test_feathering_stays_inside() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40] = 1
    soft = masks.feather(mask, 4)
    assert soft[mask == 0].max() == 0
    assert soft[30, 30] == 1
    assert 0 < soft[20, 30] < soft[22, 30] < 1
    assert np.array_equal(masks.feather(mask, 0), mask.astype(np.float32))
    assert masks.feather(np.ones((10, 10)), 3).min() == 1, "the picture's own border is no edge"


def test_extent() -> None:
    mask = np.zeros((50, 40), np.uint8)
    assert masks.bounding_box(mask) is None
    mask[10:20, 5:25] = 3
    assert masks.bounding_box(mask) == Box(5, 10, 25, 20)
    assert masks.share(mask) == pytest.approx(0.1)


def test_edges_follow_the_outline_and_nothing_else() -> None:
    edges = canny(np.asarray(on_paper((200, 200), (50, 60, 150, 140))))
    assert set(np.unique(edges)) == {0, 255}
    box = masks.bounding_box(edges)
    assert box is not None
    assert (
        np.abs(np.array([box.left, box.top, box.right, box.bottom]) - [50, 60, 151, 141]).max() < 3
    )
    assert 300 < (edges > 0).sum() < 500


def test_pale_lace_keeps_its_edges() -> None:
    pale = Image.new("RGB", (128, 128), (250, 250, 250))
    ImageDraw.Draw(pale).ellipse((30, 30, 100, 100), outline=(215, 215, 215), width=3)
    assert (canny(np.asarray(pale)) > 0).sum() > 200
    assert not canny(np.full((64, 64, 3), 200, np.uint8)).any()


def test_the_same_photograph_again_is_found() -> None:
    def photograph(seed: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
        return Image.fromarray(coarse).resize((200, 200), Image.Resampling.BICUBIC)

    buffer = io.BytesIO()
    photograph(1).resize((130, 130)).save(buffer, "JPEG", quality=60)
    pictures = [
        photograph(0),
        photograph(1),
        photograph(2),
        Image.open(buffer),
        photograph(1).filter(ImageFilter.GaussianBlur(1)),
        photograph(3),
    ]
    hashes = [perceptual_hash(image) for image in pictures]
    assert group_near_duplicates(hashes) == [[1, 3, 4]]
    assert group_near_duplicates([]) == []


def test_groups_are_chained() -> None:
    hashes = ["0000000000000000", "00000000000000ff", "000000000000000f", "f" * 16, "f" * 15 + "e"]
    assert group_near_duplicates(hashes) == [[0, 1, 2], [3, 4]]
