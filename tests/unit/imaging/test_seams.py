"""Where copies of a tile lie, and what counts as a seam."""

import numpy as np
import pytest
from PIL import Image

from toile.imaging.seams import Repeat, seam_score, tile, window
from toile.v1 import common_pb2

HEIGHT, WIDTH = 48, 64


def seamless(repeat: Repeat) -> Image.Image:
    """Waves that fit the lattice: each period divides its two steps, half a tile included."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    picture = np.zeros((HEIGHT, WIDTH, 3))
    steps = {
        Repeat.STRAIGHT: ((HEIGHT, 0), (0, WIDTH)),
        Repeat.HALF_DROP: ((HEIGHT, 0), (HEIGHT / 2, WIDTH)),
        Repeat.BRICK: ((HEIGHT, WIDTH / 2), (0, WIDTH)),
    }[repeat]
    dual = 2 * np.pi * np.linalg.inv(np.array(steps)).T
    rng = np.random.default_rng(0)
    for channel in range(3):
        for first, second in ((1, 0), (0, 1), (2, -1), (3, 2), (-4, 5)):
            down, across = first * dual[0] + second * dual[1]
            phase = rng.uniform(0, 2 * np.pi)
            picture[..., channel] += np.sin(down * rows + across * columns + phase)
    return Image.fromarray((127 + 25 * picture).clip(0, 255).astype(np.uint8))


def test_the_numbers_are_those_of_the_contract() -> None:
    assert {f"REPEAT_{one.name}": one.value for one in Repeat} == {
        name: value for name, value in common_pb2.Repeat.items() if value
    }


@pytest.mark.parametrize("repeat", list(Repeat))
def test_a_seamless_tile_scores_one(repeat: Repeat) -> None:
    assert seam_score(seamless(repeat), repeat) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("repeat", list(Repeat))
def test_a_tile_of_another_lattice_has_seams(repeat: Repeat) -> None:
    picture = seamless(repeat)
    assert all(seam_score(picture, other) > 1.8 for other in Repeat if other is not repeat)


@pytest.mark.parametrize("repeat", list(Repeat))
def test_a_gradient_has_a_seam(repeat: Repeat) -> None:
    ramp = np.linspace(0, 255, WIDTH, dtype=np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[None, :, None], (HEIGHT, WIDTH, 3)).copy())
    assert seam_score(picture, repeat) > 10


def test_stripes_and_plain_colours_are_no_seams() -> None:
    stripes = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stripes[:, ((np.arange(WIDTH) + 2) // 4) % 2 == 0] = (200, 30, 60)
    picture = Image.fromarray(stripes)
    assert seam_score(picture, Repeat.STRAIGHT) < 1
    # Dropping a column does not move an upright stripe.
    assert seam_score(picture, Repeat.HALF_DROP) == seam_score(picture, Repeat.STRAIGHT)
    assert seam_score(Image.new("RGB", (8, 8), "teal"), Repeat.BRICK) == 1


def test_copies_lie_on_their_lattice() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    laid = {r: np.asarray(tile(Image.fromarray(pixels), r, columns=2, rows=2)) for r in Repeat}
    for copies in laid.values():
        assert copies.shape == (2 * HEIGHT, 2 * WIDTH, 3)
        assert (copies[:HEIGHT, :WIDTH] == pixels).all()
    assert (laid[Repeat.STRAIGHT][HEIGHT:, WIDTH:] == pixels).all()
    half = HEIGHT // 2
    assert (laid[Repeat.HALF_DROP][half : half + HEIGHT, WIDTH:] == pixels).all()
    half = WIDTH // 2
    assert (laid[Repeat.BRICK][HEIGHT:, half : half + WIDTH] == pixels).all()


@pytest.mark.parametrize("repeat", list(Repeat))
def test_moving_the_frame_there_and_back_changes_nothing(repeat: Repeat) -> None:
    pixels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    size = (HEIGHT, WIDTH)
    for corner in ((1, 1), (30, 63), (47, 5), (100, -70)):
        moved = pixels[window(repeat, size, corner, size)]
        assert sorted(moved.reshape(-1)) == list(range(HEIGHT * WIDTH))
        assert (moved[window(repeat, size, (-corner[0], -corner[1]), size)] == pixels).all()
