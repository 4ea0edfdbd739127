"""Stage `evaluate`: does the base draw what it is asked for, measured without a person.

Colours are measured inside the mask the bundle's segmenter predicts. Categories are judged by a
small classifier that is trained on renders and must itself reach 95 % on renders it has not seen
before its word counts.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image

from toile.diffusion.architecture import NATIVE_SIZE
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.segmenter import Segmenter
from toile.imaging.alignment import edge_alignment
from toile.imaging.colours import dominant_colour, nearest_colour_name
from toile.imaging.control_maps import ControlKind, edge_map
from toile.imaging.edges import canny
from toile.imaging.renderer import Render, render, sample_spec
from toile.imaging.renderer.vocabulary import GARMENTS
from toile.training.tiny_base.classifier import CategoryClassifier, load_classifier
from toile.training.tiny_base.vae import to_tensor

UInt8Array = npt.NDArray[np.uint8]

EVALUATED_COLOURS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
# None of these wordings occurs in a training caption.
PROMPTS = (
    "a {category} in {colour}",
    "one {colour} {category}",
    "a plain {colour} {category} against a {background} backdrop",
)
STEPS = 20
GUIDANCE_SCALE = 3.0
_HELD_OUT_SEED = 900_001


@dataclass(frozen=True)
class Evaluation:
    """Shares in 0..1, counts, decibels and seconds."""

    images: int
    colour_accuracy: float
    category_accuracy: float
    classifier_accuracy: float
    classifier_renders: int
    seconds_per_image: float
    colour_errors: dict[str, list[str]]
    category_errors: dict[str, list[str]]


def held_out_renders(count: int) -> list[Render]:
    """Renders of specifications that no training stage draws."""
    return [
        render(sample_spec(np.random.default_rng([_HELD_OUT_SEED, index])), NATIVE_SIZE)
        for index in range(count)
    ]


def held_out_prompts(count: int) -> list[tuple[str, str, str]]:
    """(prompt, colour, category) over all colours and garments in turn, wording varied."""
    pairs = list(itertools.product(EVALUATED_COLOURS, GARMENTS))
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(pairs))
    chosen = []
    for index in range(count):
        colour, category = pairs[int(order[index % len(pairs)])]
        template = PROMPTS[(index + index // len(pairs)) % len(PROMPTS)]
        background = "black" if colour == "white" else "white"
        prompt = template.format(colour=colour, category=category, background=background)
        if category in ("pants", "shorts"):
            prompt = prompt.removeprefix("a ")
        chosen.append((prompt, colour, category))
    return chosen


def classifier_accuracy(classifier: CategoryClassifier, renders: Sequence[Render]) -> float:
    """Share of renders whose category the classifier names."""
    named = classifier.name([drawn.image for drawn in renders])
    return _share(named, [drawn.attributes["category"] for drawn in renders])


def measured_colour(segmenter: Segmenter, image: UInt8Array) -> str:
    """The name of the garment's colour inside the predicted mask."""
    mask = segmenter.predict([image])[0] > 0
    return nearest_colour_name(dominant_colour(image, mask))


def generate(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 1,
) -> list[UInt8Array]:
    """One picture a prompt, each from its own seed; so many are drawn at once."""
    pictures: list[UInt8Array] = []
    for start in range(0, len(prompts), batch):
        asked = list(prompts[start : start + batch])
        seeds = range(seed + start, seed + start + len(asked))
        result = pipeline(
            prompt=asked,
            height=NATIVE_SIZE,
            width=NATIVE_SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            output_type="np",
        )
        pictures += list((np.asarray(result.images) * 255.0).round().astype(np.uint8))
    return pictures


def evaluate(bundle: Path, *, images: int = 160, renders: int = 300, batch: int = 1) -> Evaluation:
    """Measure a bundle on held-out prompts and renders; so many images are drawn at once."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    segmenter, classifier = Segmenter.load(bundle / "segmenter"), load_classifier(bundle)
    asked = held_out_prompts(images)
    generate(pipeline, [asked[0][0]])  # the first call pays for warming up
    started = time.monotonic()
    pictures = generate(pipeline, [prompt for prompt, _, _ in asked], batch=batch)
    seconds = (time.monotonic() - started) / images
    colours = [measured_colour(segmenter, picture) for picture in pictures]
    categories = classifier.name(pictures)
    return Evaluation(
        images=images,
        colour_accuracy=_share(colours, [colour for _, colour, _ in asked]),
        category_accuracy=_share(categories, [category for _, _, category in asked]),
        classifier_accuracy=classifier_accuracy(classifier, held_out_renders(renders)),
        classifier_renders=renders,
        seconds_per_image=round(seconds, 3),
        colour_errors=_errors(colours, [colour for _, colour, _ in asked]),
        category_errors=_errors(categories, [category for _, _, category in asked]),
    )


def write_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Write the figures as JSON."""
    rounded: dict[str, Any] = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in asdict(evaluation).items()
    }
    file.write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")


def reconstruction_decibels(vae: AutoencoderKL, images: Sequence[UInt8Array]) -> float:
    """Mean PSNR of pictures through the autoencoder."""
    values = []
    with torch.inference_mode():
        for image in images:
            batch = to_tensor(image[None])
            decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            error = ((decoded - batch) / 2.0).pow(2).mean().item()
            values.append(-10.0 * np.log10(error))
    return float(np.mean(values))


def segmenter_agreement(segmenter: Segmenter, renders: Sequence[Render]) -> float:
    """Mean intersection over union of predicted and true garment masks."""
    values = []
    for drawn in renders:
        predicted, true = segmenter.predict([drawn.image])[0] > 0, drawn.labels > 0
        values.append((predicted & true).sum() / max(1, int((predicted | true).sum())))
    return float(np.mean(values))


def edge_agreement(bundle: Path, renders: Sequence[Render]) -> tuple[float, float]:
    """How well drawings keep the edges of renders that their ControlNet is shown, and without it.

    Drawn by the renders' captions; the boundary F-measure of `toile.imaging.alignment`.
    """
    base = Bundle.load(bundle)
    network, denoiser = base.controlnet(ControlKind.EDGES), TorchDenoiser(base)
    values = []
    for seed, drawn in enumerate(renders):
        shown = Image.fromarray(edge_map(drawn.image))
        for controls in ([LoadedControl(network, shown)], []):
            request = DiffusionRequest(
                drawn.captions[0],
                [seed],
                steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                controls=controls,
            )
            (picture,) = diffuse(base, denoiser, request)
            values.append(edge_alignment(canny(drawn.image), np.asarray(picture)))
    return float(np.mean(values[::2])), float(np.mean(values[1::2]))


def _share(answers: Sequence[str], truths: Sequence[str]) -> float:
    return float(np.mean([a == t for a, t in zip(answers, truths, strict=True)]))


def _errors(answers: Sequence[str], truths: Sequence[str]) -> dict[str, list[str]]:
    wrong: dict[str, list[str]] = {}
    for answer, truth in zip(answers, truths, strict=True):
        if answer != truth:
            wrong.setdefault(truth, []).append(answer)
    return wrong
