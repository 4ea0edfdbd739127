import numpy as np
import pytest

from toile.imaging.colours import rgb_to_lab
from toile.imaging.palette import hold_to, parse_colour

RED, NAVY, IVORY = (206, 32, 40), (28, 38, 92), (240, 234, 214)


def folds() -> np.ndarray:
    """Red cloth, lighter and darker from row to row, beside white."""
    pixels = np.full((300, 40, 3), 245, np.float64)
    pixels[:, :20] = np.array(RED) * np.linspace(0.6, 1.1, 300)[:, None, None]
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("text", "rgb"),
    [
        ("#ff8000", (255, 128, 0)),
        ("#FF8000", (255, 128, 0)),
        (" #000001 ", (0, 0, 1)),
        ("red", RED),
        ("navy blue", NAVY),
        ("#ff80", None),
        ("ff8000", None),
        ("a red dress", None),
        ("", None),
    ],
)
def test_colours_are_hex_or_names(text: str, rgb: tuple[int, int, int] | None) -> None:
    assert parse_colour(text) == rgb


def test_at_full_strength_every_pixel_is_the_nearest_colour() -> None:
    image = np.random.default_rng(3).integers(0, 255, (300, 20, 3), np.uint8)
    palette = [RED, NAVY, IVORY]
    held = hold_to(image, palette)
    lab, table = rgb_to_lab(image), rgb_to_lab(np.array(palette, np.uint8))
    nearest = np.linalg.norm(lab[:, :, None] - table, axis=3).argmin(axis=2)
    assert (held == np.array(palette, np.uint8)[nearest]).all()


def test_less_strength_keeps_folds_and_goes_part_of_the_way() -> None:
    before = folds()
    half, most = (rgb_to_lab(hold_to(before, [NAVY, IVORY], s)) for s in (0.5, 0.9))
    start, goal = rgb_to_lab(before), rgb_to_lab(NAVY)

    def away(lab: np.ndarray) -> float:
        return float(np.abs(lab[:, :20, 1:] - goal[1:]).mean())

    assert away(start) > away(half) > away(most) > 0
    for lab in (half, most):  # what was lighter cloth still is
        assert (np.diff(lab[::30, 5, 0]) > 0).all()
    assert np.ptp(half[:, 5, 0]) > 0.6 * np.ptp(start[:, 5, 0])


def test_a_palette_colour_stays_what_it_is() -> None:
    image = np.full((4, 4, 3), RED, np.uint8)
    for strength in (0.2, 0.7, 1.0):
        assert (hold_to(image, [RED, IVORY], strength) == image).all()
