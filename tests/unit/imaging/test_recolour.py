import cv2
import numpy as np
import pytest

from toile.imaging.colour_words import Shade
from toile.imaging.colours import NAMED_COLOURS, dominant_colour, nearest_colour_name, rgb_to_lab
from toile.imaging.recolour import recolour
from toile.imaging.renderer.draw import Render, render
from toile.imaging.renderer.spec import sample_spec


def drawn(
    colour: str, *, pattern: str = "plain", material: str = "cotton", seed: int = 5
) -> Render:
    rng = np.random.default_rng(seed)
    spec = sample_spec(
        rng,
        category="skirt",
        colour=colour,
        pattern="plain",
        material=material,
        background="grey" if colour != "grey" else "white",
    )
    return render(spec, 128)


def lightness(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return rgb_to_lab(image[mask])[:, 0]


@pytest.mark.parametrize("before", ["white", "black", "red", "yellow", "navy"])
@pytest.mark.parametrize("after", sorted(NAMED_COLOURS))
def test_the_garment_has_the_new_colour_and_the_rest_its_pixels(before: str, after: str) -> None:
    source = drawn(before)
    mask = source.labels != 0
    result = recolour(source.image, mask, NAMED_COLOURS[after])
    assert nearest_colour_name(dominant_colour(result, mask)) == after
    assert (result[~mask] == source.image[~mask]).all()


@pytest.mark.parametrize(("before", "after"), [("red", "blue"), ("white", "red"), ("navy", "pink")])
def test_folds_stay_where_they_were(before: str, after: str) -> None:
    source = drawn(before)
    mask = source.labels != 0
    result = recolour(source.image, mask, NAMED_COLOURS[after])
    inside = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), dtype=np.uint8)) != 0
    old, new = lightness(source.image, inside), lightness(result, inside)
    assert np.corrcoef(old, new)[0, 1] > 0.95
    assert new.std() > 0.5 * old.std()


@pytest.mark.parametrize(("before", "after"), [("white", "black"), ("black", "white")])
def test_even_black_and_white_keep_some_of_their_folds(before: str, after: str) -> None:
    source = drawn(before)
    mask = source.labels != 0
    result = recolour(source.image, mask, NAMED_COLOURS[after])
    assert lightness(result, mask).std() > 0.8


def test_a_print_keeps_its_colour() -> None:
    pixels = np.full((64, 64, 3), NAMED_COLOURS["red"], dtype=np.uint8)
    pixels[::8, ::8] = pixels[1::8, ::8] = pixels[::8, 1::8] = NAMED_COLOURS["white"]
    mask = np.ones((64, 64), dtype=bool)
    result = recolour(pixels, mask, NAMED_COLOURS["green"])
    assert np.abs(result[8, 8].astype(int) - NAMED_COLOURS["white"]).max() < 12
    assert nearest_colour_name(dominant_colour(result)) == "green"
    dyed = recolour(pixels, mask, NAMED_COLOURS["green"], keep_prints=False)
    assert np.abs(dyed[8, 8].astype(int) - NAMED_COLOURS["white"]).max() > 25


def test_a_pixel_half_backdrop_becomes_half_new_cloth() -> None:
    pixels = np.full((40, 40, 3), NAMED_COLOURS["white"], dtype=np.uint8)
    pixels[:, 20:] = NAMED_COLOURS["red"]
    pixels[:, 19] = (np.add(NAMED_COLOURS["red"], NAMED_COLOURS["white"]) // 2).astype(np.uint8)
    mask = np.zeros((40, 40), dtype=bool)
    mask[:, 17:] = True
    result = recolour(pixels, mask, NAMED_COLOURS["blue"])
    red, _, blue = (int(value) for value in result[20, 19])
    assert blue > red  # no red rim
    assert np.abs(result[:, :18].astype(int) - NAMED_COLOURS["white"]).max() < 12  # nor a blue one


def test_lace_is_dyed_as_a_whole() -> None:
    source = drawn("white", material="lace")
    mask = source.labels != 0
    result = recolour(source.image, mask, NAMED_COLOURS["blue"], keep_prints=False)
    chroma = rgb_to_lab(result[mask])
    assert (chroma[:, 2] < -8).mean() > 0.85


def test_an_empty_region_changes_nothing() -> None:
    source = drawn("red")
    nothing = np.zeros(source.labels.shape, dtype=bool)
    assert (recolour(source.image, nothing, NAMED_COLOURS["blue"]) == source.image).all()


@pytest.mark.parametrize("modifier", ["dark", "light"])
@pytest.mark.parametrize("name", sorted(set(NAMED_COLOURS) - {"black", "white"}))
def test_darker_and_lighter_shades_are_that_and_keep_their_name(name: str, modifier: str) -> None:
    plain, shade = Shade(name), Shade(name, modifier)
    difference = rgb_to_lab(shade.rgb)[0] - rgb_to_lab(plain.rgb)[0]
    assert (difference < -3) if modifier == "dark" else (difference > 3)
    assert nearest_colour_name(shade.rgb) == name
