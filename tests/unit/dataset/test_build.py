"""The steps of a build, without Ray."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toile.core.artifacts import open_store, publish_folder
from toile.core.catalog.models import BaseRow, DatasetRow, PhotographRow
from toile.core.settings import Settings
from toile.diffusion.architecture import bundle_description
from unit.imaging.files import encoded, picture

pytest.importorskip("ray", reason="the compute extra is not installed")

from toile.dataset.build.job import Item, Plan, content_rating, orphans, split, with_trigger
from toile.dataset.build.steps import See, prepare


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("white floral lace", "<lace> white floral lace"),
        ("<lace> white", "<lace> white"),
        ("<Lace> white", "<Lace> white"),
        ("<lace>y things", "<lace> <lace>y things"),
        ("", "<lace>"),
    ],
)
def test_captions_begin_with_the_trigger_word_once(caption: str, expected: str) -> None:
    assert with_trigger("<lace>", caption) == expected


@pytest.mark.parametrize(
    ("said", "caption", "rating"),
    [
        ("UNSPECIFIED", "<lace> a dress", "UNSPECIFIED"),
        ("GENERAL", "<lace> nude heels", "GENERAL"),
        ("GENERAL", "<lace> a nude woman", "RESTRICTED"),
        ("RESTRICTED", "<lace> a dress", "RESTRICTED"),
    ],
)
def test_a_caption_may_make_a_version_restricted(said: str, caption: str, rating: str) -> None:
    items = [
        Item("images/1.png", text, "e", "m", "a.jpg", "0" * 64, 8, 8, False)
        for text in ("<lace> a skirt", caption)
    ]
    assert content_rating(DatasetRow(content_rating=said), items) == rating


def test_metadata_has_the_columns_that_imagefolder_reads() -> None:
    item = Item("images/0001.png", "<lace> x", "e", "m", "a.jpg", "0" * 64, 8, 8, False)
    columns = json.loads(json.dumps(asdict(item)))
    assert {"file_name", "text", "mask", "edges", "source_digest"} <= columns.keys()


def test_a_photograph_is_prepared_the_same_way_every_time(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_store(settings).put("photo", encoded(picture(300, 200), "JPEG"))
    row = {"index": 1, "artifact": "photo", "caption": ""}

    first, second = (prepare(row, settings, 64) for _ in range(2))

    assert first == second
    assert (first["reason"], len(first["perceptual_hash"])) == ("", 16)
    for name in ("image", "edges"):
        with Image.open(io.BytesIO(first[name])) as image:
            assert (image.format, image.size) == ("PNG", (64, 64))


def test_a_photograph_that_keeps_its_shape_is_brought_into_a_bucket(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_store(settings).put("photo", encoded(picture(300, 400), "JPEG"))
    row = {"index": 1, "artifact": "photo", "caption": ""}
    kept = prepare(row, settings, 128, "keep")
    assert (kept["width"], kept["height"]) == (96, 160)
    assert (kept["original_width"], kept["original_height"]) == (300, 400)
    assert (kept["crop_left"], kept["crop_top"]) == (12, 0), "of 120 x 160"
    for name in ("image", "edges"):
        with Image.open(io.BytesIO(kept[name])) as image:
            assert image.size == (96, 160)


@pytest.mark.parametrize("aspect", ["square", "keep"])
def test_a_map_is_cut_as_its_photograph_is(tmp_path: Path, aspect: str) -> None:
    settings = Settings(home=tmp_path)
    photograph = np.full((300, 400, 3), 250, np.uint8)
    photograph[60:200, 250:350] = (200, 30, 30)  # off the middle, so that the cut follows it
    store = open_store(settings)
    store.put("photo", encoded(Image.fromarray(photograph), "PNG"))
    small = Image.fromarray(photograph).resize((200, 150), Image.Resampling.NEAREST)
    store.put("small", encoded(small, "PNG"))
    row = {"index": 1, "artifact": "photo", "caption": ""}
    assert prepare(row, settings, 128, aspect)["conditioning_image"] == b""
    alike = prepare({**row, "conditioning": "photo"}, settings, 128, aspect)
    assert alike["conditioning_image"] == alike["image"]
    scaled = prepare({**row, "conditioning": "small"}, settings, 128, aspect)
    image, shown = (
        np.asarray(Image.open(io.BytesIO(scaled[name])), int)
        for name in ("image", "conditioning_image")
    )
    assert shown.shape == image.shape
    assert np.abs(shown - image).mean() < 4


def test_a_map_that_cannot_be_read_rejects_its_photograph(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    store = open_store(settings)
    store.put("photo", encoded(picture(), "JPEG"))
    store.put("broken", encoded(picture(), "JPEG")[:500])
    row = {"index": 1, "artifact": "photo", "caption": "", "conditioning": "broken"}
    assert prepare(row, settings, 64)["reason"] == "TRUNCATED_IMAGE"


def test_maps_are_told_from_images_by_their_folder() -> None:
    names = ["conditioning/worn/b.png", "a.jpg", "worn/b.jpg", "conditioning/none.png"]
    images, maps = split([PhotographRow(file_name=name) for name in names])
    assert [row.file_name for row in images] == ["a.jpg", "worn/b.jpg"]
    plan = Plan(DatasetRow(), BaseRow(), 64, "square", images, maps)
    assert plan.map_of(images[0]) is None
    assert plan.map_of(images[1]).file_name == "conditioning/worn/b.png"
    assert [rejection.file_name for rejection in orphans(plan)] == ["conditioning/none.png"]


def test_metadata_of_squares_is_what_it_was() -> None:
    """Else the same photographs would make a version of another digest."""
    item = Item("images/0001.png", "<lace> x", "e", "m", "a.jpg", "0" * 64, 8, 8, False)
    columns = json.loads(item.to_json()).keys()
    assert not {"original_size", "crop_left_top", "conditioning"} & columns
    kept = replace(item, original_size=(3, 4), crop_left_top=(0, 1))
    assert json.loads(kept.to_json())["original_size"] == [3, 4]


def test_what_is_wrong_with_a_photograph_goes_into_its_row(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_store(settings).put("broken", encoded(picture(), "JPEG")[:500])
    reasons = [
        prepare({"index": 1, "artifact": artifact, "caption": ""}, settings, 64)["reason"]
        for artifact in ("broken", "missing")
    ]
    assert reasons == ["TRUNCATED_IMAGE", "DATA_LOSS"]


def test_masks_and_captions_are_made_for_what_is_usable(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    store = open_store(settings)
    publish_folder(store, "bases/tiny/1", tiny_bundle)
    good = encoded(picture(64, 64))
    see = See(settings, "bases/tiny/1")

    seen = see({"image": np.array([good, b"", good], object), "index": np.arange(3)})

    assert seen["described"][1] == ""
    assert seen["mask"][1] == b""
    assert seen["described"][0] == seen["described"][2]
    words = bundle_description()
    colour, *_, category = seen["described"][0].split()
    assert colour in words["colours"]
    assert category in words["categories"]
    with Image.open(io.BytesIO(seen["mask"][0])) as mask:
        assert (mask.mode, mask.size) == ("P", (64, 64))
        assert np.asarray(mask).max() < len(seen["mask_labels"][0])
