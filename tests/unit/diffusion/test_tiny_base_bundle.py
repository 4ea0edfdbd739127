import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from toile.diffusion.architecture import NATIVE_SIZE, build_random_bundle, load_refiner
from toile.diffusion.segmenter import Segmenter
from toile.diffusion.tokenizer import training_words

_LIMIT_BYTES = 40_000_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    build_random_bundle(path, seed=1)
    return path


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(bundle)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_a_bundle_stays_small_and_holds_no_pickles(bundle):
    files = [file for file in bundle.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= _LIMIT_BYTES
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}


def test_the_stock_pipeline_loads_it_in_single_precision_and_draws(pipeline):
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder_2)} == {
        torch.float32
    }
    image = pipeline(
        "a red dress", num_inference_steps=2, height=NATIVE_SIZE, width=NATIVE_SIZE
    ).images[0]
    assert image.size == (NATIVE_SIZE, NATIVE_SIZE)


def test_the_refiner_shares_the_bundle_and_asks_for_an_aesthetics_score(bundle, pipeline):
    refiner = load_refiner(bundle, pipeline)
    assert refiner.config.requires_aesthetics_score
    assert refiner.text_encoder_2 is pipeline.text_encoder_2
    refiner.set_progress_bar_config(disable=True)
    start = pipeline("a hat", num_inference_steps=2).images[0]
    refined = refiner("a hat", image=start, num_inference_steps=4, strength=0.5).images[0]
    assert refined.size == start.size


def test_the_same_seed_builds_the_same_bundle(bundle, tmp_path):
    build_random_bundle(tmp_path, seed=1)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (bundle / name).read_bytes()


def test_the_description_names_what_captions_are_made_of(bundle):
    description = json.loads((bundle / "toile.json").read_text(encoding="utf-8"))
    assert description["native_size"] == NATIVE_SIZE
    assert {"red", "white"} <= set(description["colours"])
    assert {"dress", "fabric"} <= set(description["categories"])
    assert description["trained"] is False


@pytest.mark.parametrize("text", ["<lace>", "a <lace> dress", "zürich ☃ 42", "my_style-1"])
def test_the_tokenizer_keeps_every_word_losslessly(bundle, text):
    tokenizer = CLIPTokenizer.from_pretrained(bundle / "tokenizer")
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_words_of_the_trade_are_one_token_each(bundle):
    tokenizer = CLIPTokenizer.from_pretrained(bundle / "tokenizer")
    words = [word for word in training_words() if word.isalpha()]
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)


def test_the_segmenter_labels_pictures_of_any_size(bundle):
    segmenter = Segmenter.load(bundle / "segmenter")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((70, 51), (128, 200))]
    maps = segmenter.predict(pictures)
    assert [m.shape for m in maps] == [(70, 51), (128, 200)]
    assert all(m.max() < len(segmenter.config.classes) for m in maps)
