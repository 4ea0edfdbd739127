"""How well a drawing keeps to its map."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from toile.imaging.alignment import edge_alignment, part_overlap, silhouette_overlap
from toile.imaging.edges import canny

UInt8Array = npt.NDArray[np.uint8]


def square(left: int, side: int = 40) -> UInt8Array:
    image = np.zeros((96, 96, 3), np.uint8)
    image[20 : 20 + side, left : left + side] = (220, 220, 220)
    return image


NOTHING: UInt8Array = np.zeros((96, 96, 3), np.uint8)


def test_a_picture_keeps_to_its_own_edges() -> None:
    assert edge_alignment(canny(square(20)), square(20)) == 1.0


@pytest.mark.parametrize(("shift", "least", "most"), [(1, 0.99, 1.0), (2, 0.99, 1.0), (12, 0, 0.6)])
def test_two_pixels_are_forgiven(shift: int, least: float, most: float) -> None:
    assert least <= edge_alignment(canny(square(20)), square(20 + shift)) <= most


def test_edges_that_nobody_asked_for_count_as_well_as_those_that_lack() -> None:
    busy = square(20)
    for x in range(4, 96, 9):
        cv2.line(busy, (x, 66), (x, 94), (255, 255, 255), 1)
    more = edge_alignment(canny(square(20)), busy)
    less = edge_alignment(canny(busy), square(20))
    assert more == pytest.approx(less, abs=1e-6)
    assert 0.1 < more < 0.9


def test_no_edges() -> None:
    assert edge_alignment(canny(NOTHING), NOTHING) == 1.0
    assert edge_alignment(canny(square(20)), NOTHING) == 0.0
    assert edge_alignment(canny(NOTHING), square(20)) == 0.0


def test_overlap_is_meant_over_the_parts() -> None:
    wanted = np.array([[1, 1, 1, 1], [2, 2, 0, 0]], np.uint8)
    found = np.array([[1, 1, 0, 0], [2, 2, 0, 0]], np.uint8)
    assert part_overlap(wanted, found) == pytest.approx((0.5 + 1.0) / 2)
    assert part_overlap(wanted, wanted) == 1.0
    assert part_overlap(wanted, np.where(wanted, 3, 0).astype(np.uint8)) == 0.0


def test_the_background_is_no_part() -> None:
    background = np.zeros((4, 4), np.uint8)
    one_part = background.copy()
    one_part[0, 0] = 5
    assert part_overlap(background, background) == 1.0
    assert part_overlap(one_part, background) == 0.0


def test_silhouettes_know_no_parts() -> None:
    wanted = np.zeros((10, 10), np.uint8)
    wanted[:, :4], wanted[:, 4:6] = 1, 2
    found = np.zeros((10, 10), np.uint8)
    found[:, 2:8] = 3
    assert silhouette_overlap(wanted, found) == 40 / 80
    assert silhouette_overlap(wanted, wanted) == 1.0
    nothing = np.zeros((10, 10), np.uint8)
    assert silhouette_overlap(nothing, nothing) == 1.0
    assert silhouette_overlap(wanted, nothing) == 0.0
