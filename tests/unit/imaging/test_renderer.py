import cv2
import numpy as np
import pytest

from toile.imaging.colours import NAMED_COLOURS, dominant_colour, nearest_colour_name
from toile.imaging.renderer import render, sample_spec
from toile.imaging.renderer.captions import make_caption
from toile.imaging.renderer.lace_samples import sample_specs, write_lace_samples
from toile.imaging.renderer.spec import HELD_OUT_MOTIF, LACE_MOTIFS
from toile.imaging.renderer.vocabulary import CATEGORIES, GARMENTS, PART_NAMES


def _spec(seed: int, **wanted: str):
    return sample_spec(np.random.default_rng(seed), **wanted)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_render_has_a_labelled_garment_that_fills_a_good_part_of_the_picture(category):
    drawn = render(_spec(3, category=category), 96)
    assert drawn.image.shape == (96, 96, 3)
    assert drawn.image.dtype == np.uint8
    assert drawn.labels.shape == (96, 96)
    assert drawn.labels.max() < len(PART_NAMES)
    assert 0.12 < (drawn.labels > 0).mean() <= 1.0
    assert drawn.attributes["category"] == category


def test_the_same_specification_gives_the_same_pixels_and_another_seed_gives_others():
    spec = _spec(5, category="dress")
    assert np.array_equal(render(spec, 64).image, render(spec, 64).image)
    assert not np.array_equal(render(spec, 64).image, render(_spec(6, category="dress"), 64).image)


def test_a_render_shows_the_same_garment_at_every_size():
    spec = _spec(11, category="jacket", material="cotton", pattern="plain")
    small, large = render(spec, 64), render(spec, 256)
    shrunk = cv2.resize((large.labels > 0).astype(np.float32), (64, 64), None, 0, 0, cv2.INTER_AREA)
    assert np.mean((shrunk > 0.5) == (small.labels > 0)) > 0.97


@pytest.mark.parametrize("colour", NAMED_COLOURS)
def test_a_plain_garment_measures_as_the_colour_its_caption_names(colour):
    right = 0
    for seed, category in enumerate(GARMENTS):
        spec = _spec(seed, category=category, colour=colour, pattern="plain", material="cotton")
        drawn = render(spec, 96)
        right += nearest_colour_name(dominant_colour(drawn.image, drawn.labels)) == colour
    assert right >= 7


def test_sleeves_are_labelled_on_a_shirt_and_legs_on_pants():
    shirt, pants = render(_spec(2, category="shirt"), 96), render(_spec(2, category="pants"), 96)
    assert (shirt.labels == PART_NAMES.index("sleeves")).any()
    assert (pants.labels == PART_NAMES.index("legs")).any()


def test_captions_name_the_garment_and_vary_in_what_they_leave_out():
    names = _spec(0, category="dress", colour="red", pattern="floral", background="grey").names
    rng = np.random.default_rng(0)
    captions = {make_caption(rng, names) for _ in range(80)}
    assert len(captions) > 8
    assert all("dress" in caption and caption == caption.lower() for caption in captions)
    assert any("red floral dress on grey background" in caption for caption in captions)


def test_lace_shows_what_lies_under_it():
    spec = _spec(4, category="t-shirt", colour="white", material="lace")
    drawn = render(spec, 192)
    inside = cv2.erode((drawn.labels == PART_NAMES.index("body")).astype(np.uint8), np.ones((9, 9)))
    brightness = drawn.image[inside > 0].mean(axis=1)
    assert brightness.std() > 15


def test_the_sample_folder_keeps_to_one_style_that_training_never_draws(tmp_path):
    assert HELD_OUT_MOTIF not in LACE_MOTIFS
    specs = sample_specs()
    assert {spec.cloth.motif for spec in specs} == {HELD_OUT_MOTIF}
    assert len({spec.category for spec in specs}) >= 8
    files = write_lace_samples(tmp_path)
    assert 24 <= len(files) <= 40
    assert sum(file.stat().st_size for file in files) < 4_000_000
    assert cv2.imread(str(files[0])).shape == (512, 512, 3)
    assert list(tmp_path.glob("*.txt"))
