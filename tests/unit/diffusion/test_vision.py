import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unit.imaging.files import picture

pytest.importorskip("torch", reason="the compute extra is not installed")

from toile.core.errors import FailedPreconditionError
from toile.diffusion.vision import Vision


@pytest.fixture(scope="module")
def vision(tiny_bundle: Path) -> Vision:
    return Vision(tiny_bundle)


def cloth(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((150, 200), Image.Resampling.BICUBIC)


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(vision: Vision) -> None:
    images = [cloth(seed) for seed in range(3)]
    together = vision.embed_images(images)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    for image, embedding in zip(images, together, strict=True):
        assert vision.embed_images([image])[0] == pytest.approx(embedding, abs=1e-4)


def test_texts_share_the_space_of_images(vision: Vision) -> None:
    texts = ["a red dress", "white floral lace fabric", "", "word " * 500]
    together = vision.embed_texts(texts)
    assert together.shape == (4, vision.embed_images([cloth(0)]).shape[1])
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert vision.embed_texts(texts[1:2])[0] == pytest.approx(together[1], abs=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_nothing_gives_nothing_of_the_right_width(vision: Vision) -> None:
    width = vision.embed_texts(["a"]).shape[1]
    assert vision.embed_images([]).shape == vision.embed_texts([]).shape == (0, width)
    assert vision.describe_all([]) == []


def test_parts_have_the_size_of_the_image(vision: Vision) -> None:
    labels, names = vision.segment(picture(90, 50))
    assert labels.shape == (50, 90)
    assert labels.dtype == np.uint8
    assert names[0] == "background"
    assert labels.max() < len(names)


def test_the_colour_of_a_caption_is_measured_on_the_garment(vision: Vision) -> None:
    image = Image.new("RGB", (128, 128), (40, 90, 205))
    ImageDraw.Draw(image).rectangle((30, 30, 97, 97), fill=(205, 32, 40))
    garment = np.zeros((128, 128), np.uint8)
    garment[30:98, 30:98] = 1
    (inside,) = vision.describe_all([image], [garment])
    (around,) = vision.describe_all([image], [1 - garment])
    assert inside.split()[0] == "red"
    assert around.split()[0] == "blue"


def test_a_caption_says_only_what_is_likely(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sure"
    shutil.copytree(tiny_bundle, folder)
    description = json.loads((folder / "toile.json").read_text())
    captions = {}
    for scale in (0.0, 1e6):
        description["clip_logit_scale"] = scale
        (folder / "toile.json").write_text(json.dumps(description))
        captions[scale] = Vision(folder).describe(cloth(1)).split()
    unsure, sure = captions[0.0], captions[1e6]
    assert len(unsure) == 2, "colour and category alone"
    assert unsure[-1] in description["categories"]
    assert sure[-1] in description["categories"]
    attributes = set(description["patterns"]) | set(description["materials"])
    assert len(sure) > 2
    assert set(sure[1:-1]) <= attributes - {"plain"}


@pytest.mark.parametrize("part", ["image_encoder", "feature_extractor", "segmenter", "toile.json"])
def test_a_base_that_lacks_a_part_says_so(tiny_bundle: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "blind"
    shutil.copytree(tiny_bundle, folder, ignore=shutil.ignore_patterns(part))
    with pytest.raises(FailedPreconditionError) as caught:
        Vision(folder).describe(cloth(0))
    assert caught.value.reason == "BASE_LACKS_VISION"
    assert part in caught.value.message
