import numpy as np
import pytest

from toile.imaging.colours import (
    NAMED_COLOURS,
    dominant_colour,
    lab_to_rgb,
    nearest_colour_name,
    rgb_to_lab,
)


@pytest.mark.parametrize(("name", "rgb"), NAMED_COLOURS.items())
def test_every_named_colour_bears_its_own_name(name, rgb):
    assert nearest_colour_name(rgb) == name


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 0, 0), "red"),
        ((0, 0, 255), "blue"),
        ((135, 206, 235), "blue"),
        ((0, 0, 128), "navy"),
        ((0, 100, 0), "green"),
        ((255, 192, 203), "pink"),
        ((128, 128, 128), "grey"),
        ((245, 245, 220), "beige"),
        ((139, 69, 19), "brown"),
        ((255, 255, 0), "yellow"),
    ],
)
def test_colours_known_from_the_web_get_the_name_a_person_would_give(rgb, name):
    assert nearest_colour_name(rgb) == name


def test_lab_and_back_is_the_same_colour():
    assert lab_to_rgb(rgb_to_lab((120, 40, 200))) == (120, 40, 200)


def test_the_dominant_colour_ignores_print_folds_and_what_lies_outside_the_mask():
    rng = np.random.default_rng(0)
    image = np.full((60, 60, 3), (20, 140, 60), dtype=np.uint8)
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[10:50, 10:50] = 1
    cloth = np.full((40, 40, 3), (200, 30, 40), dtype=float)
    cloth[::5] = (250, 250, 250)
    shaded = cloth * rng.uniform(0.8, 1.05, (40, 40, 1))
    image[10:50, 10:50] = np.clip(shaded, 0, 255).astype(np.uint8)
    assert nearest_colour_name(dominant_colour(image, mask)) == "red"


def test_an_empty_mask_falls_back_to_the_whole_picture():
    image = np.full((8, 8, 3), (38, 94, 204), dtype=np.uint8)
    empty = np.zeros((8, 8), dtype=np.uint8)
    assert nearest_colour_name(dominant_colour(image, empty)) == "blue"
