import cv2
import numpy as np
import pytest

from toile.core.errors import InvalidArgumentError
from toile.imaging.colours import NAMED_COLOURS
from toile.imaging.renderer.draw import render
from toile.imaging.renderer.spec import sample_spec
from toile.scoring import SCORERS, Evidence, default_weights, get_scorer


def unit(*values: float) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    return vector / np.linalg.norm(vector)


def dress(colour: str, prompt: str = "") -> Evidence:
    spec = sample_spec(
        np.random.default_rng(3),
        category="dress",
        colour=colour,
        pattern="plain",
        material="cotton",
        background="grey" if colour != "grey" else "white",
    )
    drawn = render(spec, 128)
    return Evidence(pixels=drawn.image, prompt=prompt, garment=drawn.labels != 0)


def score(name: str, evidence: Evidence) -> float | None:
    return SCORERS[name].score(evidence)


def seen(embedding: np.ndarray, **others: object) -> Evidence:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    return Evidence(pixels=pixels, embedding=embedding, **others)  # type: ignore[arg-type]


def test_prompt_is_the_cosine_of_image_and_text() -> None:
    image = unit(1, 1, 0)
    assert score("prompt", seen(image, prompt_embedding=unit(1, 1, 0))) == pytest.approx(1.0)
    assert score("prompt", seen(image, prompt_embedding=unit(0, 0, 1))) == pytest.approx(0.0)
    assert score("prompt", seen(image)) is None


def test_style_averages_over_the_nearest_references() -> None:
    near = np.stack([unit(1, 0.01 * n) for n in range(5)])
    far = np.stack([unit(-1, n) for n in range(20)])
    mixed = score("style", seen(unit(1, 0), references=np.concatenate([far, near])))
    assert mixed is not None
    assert mixed > 0.99  # what is unlike the image in the dataset does not count
    assert score("style", seen(unit(1, 0), references=far)) < 0.5  # type: ignore[operator]
    assert score("style", seen(unit(1, 0), references=near[:1])) == pytest.approx(1.0)


def test_novelty_is_nothing_for_a_copy() -> None:
    references = np.stack([unit(1, 0), unit(0, 1)])
    assert score("novelty", seen(unit(1, 0), references=references)) == pytest.approx(0.0)
    assert score("novelty", seen(unit(1, 1), references=references)) == pytest.approx(1 - 0.5**0.5)


@pytest.mark.parametrize("colour", sorted(NAMED_COLOURS))
def test_colour_is_high_only_for_the_colour_that_is_there(colour: str) -> None:
    right = score("colour", dress(colour, f"a {colour} dress on a white background"))
    assert right is not None
    assert right > 0.8
    others = {
        other: score("colour", dress(colour, f"a {other} dress"))
        for other in NAMED_COLOURS
        if other != colour
    }
    for other, value in others.items():
        assert value is not None
        assert value < 0.5, other


def test_colour_says_nothing_without_a_colour_or_a_garment() -> None:
    evidence = dress("red", "a dress on a blue background")
    assert score("colour", evidence) is None
    nothing = np.zeros_like(evidence.garment)
    bare = Evidence(pixels=evidence.pixels, prompt="a red dress", garment=nothing)
    assert score("colour", bare) is None


def test_sharpness_falls_with_blur_and_saturates() -> None:
    evidence = dress("red")
    values = []
    for sigma in (0.0, 1.0, 2.0, 4.0):
        pixels = cv2.GaussianBlur(evidence.pixels, (0, 0), sigma) if sigma else evidence.pixels
        blurred = Evidence(pixels=np.asarray(pixels), garment=evidence.garment)
        values.append(score("sharpness", blurred))
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    assert values[0] > 2 * values[-1]  # type: ignore[operator]
    noise = np.random.default_rng(0).integers(0, 255, evidence.pixels.shape, dtype=np.uint8)
    loud = score("sharpness", Evidence(pixels=noise, garment=evidence.garment))
    assert loud is not None
    assert loud < 1


def test_sharpness_ignores_the_background() -> None:
    evidence = dress("red")
    assert evidence.garment is not None
    loud = evidence.pixels.copy()
    far = cv2.dilate(evidence.garment.astype(np.uint8), np.ones((15, 15), dtype=np.uint8)) == 0
    loud[far] = np.random.default_rng(0).integers(0, 255, (int(far.sum()), 3), dtype=np.uint8)
    assert score("sharpness", Evidence(pixels=loud, garment=evidence.garment)) == score(
        "sharpness", evidence
    )


def test_defaults_leave_out_what_needs_a_dataset_when_there_is_none() -> None:
    assert set(default_weights(with_dataset=False)) == {"colour", "prompt", "sharpness"}
    assert set(default_weights(with_dataset=True)) == {"colour", "prompt", "sharpness", "style"}


def test_an_unknown_scorer_names_those_there_are() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        get_scorer("beauty")
    assert caught.value.reason == "UNKNOWN_SCORER"
    assert all(name in caught.value.message for name in SCORERS)
