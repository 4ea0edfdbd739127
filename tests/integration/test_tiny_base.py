"""The shipped weights keep what the model card promises, on a small sample of its evaluation."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import toile.diffusion
from toile.diffusion.architecture import NATIVE_SIZE, load_refiner
from toile.diffusion.segmenter import Segmenter
from toile.imaging.renderer.vocabulary import GARMENTS
from toile.training.tiny_base.classifier import load_classifier
from toile.training.tiny_base.evaluate import (
    EVALUATED_COLOURS,
    classifier_accuracy,
    edge_agreement,
    evaluate,
    held_out_prompts,
    held_out_renders,
    segmenter_agreement,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUNDLE = Path(toile.diffusion.__file__).parent / "tiny_base"
_LIMIT_BYTES = 40_000_000
_CONTROLNET_LIMIT_BYTES = 10_000_000  # ADR 10
_SAMPLE = 80

DESCRIPTION = json.loads((BUNDLE / "toile.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(BUNDLE)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_shipped_bundle_is_whole_and_small():
    assert DESCRIPTION["trained"] is True
    files = [file for file in BUNDLE.rglob("*") if file.is_file()]
    held = sum(file.stat().st_size for file in files if "controlnet" in file.parts)
    assert sum(file.stat().st_size for file in files) - held <= _LIMIT_BYTES
    assert 0 < held <= _CONTROLNET_LIMIT_BYTES


def test_the_classifier_knows_renders_it_never_saw():
    assert classifier_accuracy(load_classifier(BUNDLE), held_out_renders(120)) >= 0.95


def test_the_segmenter_finds_garments_it_never_saw():
    assert segmenter_agreement(Segmenter.load(BUNDLE / "segmenter"), held_out_renders(40)) >= 0.9


def test_drawings_keep_the_edges_they_are_shown():
    """Without, they share a silhouette at best."""
    held, free = edge_agreement(BUNDLE, held_out_renders(12))
    assert held >= free + 0.1


def test_garments_come_in_the_colour_and_kind_that_was_asked_for():
    asked = held_out_prompts(_SAMPLE)
    assert {colour for _, colour, _ in asked} == set(EVALUATED_COLOURS)
    assert {category for _, _, category in asked} == set(GARMENTS)
    measured = evaluate(BUNDLE, images=_SAMPLE, renders=20, batch=8)
    assert measured.colour_accuracy >= 0.85
    assert measured.category_accuracy >= 0.80


def test_the_refiner_changes_a_picture_a_little_and_keeps_its_subject(pipeline):
    refiner = load_refiner(BUNDLE, pipeline)
    refiner.set_progress_bar_config(disable=True)
    start = pipeline(
        "a red dress",
        height=NATIVE_SIZE,
        width=NATIVE_SIZE,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    refined = refiner(
        "a red dress",
        image=start,
        strength=0.25,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    change = float(abs(refined - start).mean())
    assert 0.001 < change < 0.08
