"""Stage `evaluate`: does the base draw what it is asked for, measured without a person.

Colours are measured inside the mask the bundle's segmenter predicts. Categories are judged by a
linear probe on the bundle's image tower, which is trained on renders and must itself reach 95 % on
renders it has not seen before its word counts.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention
from transformers import CLIPVisionModelWithProjection

from toile.diffusion.architecture import NATIVE_SIZE
from toile.diffusion.segmenter import Segmenter
from toile.imaging.colours import dominant_colour, nearest_colour_name
from toile.imaging.renderer import Render, render, sample_spec
from toile.imaging.renderer.vocabulary import CATEGORIES, GARMENTS
from toile.training.tiny_base.clip import augment
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
GUIDANCE_SCALE = 5.0
_HELD_OUT_SEED = 900_001
_PROBE_FILE = "classifier.safetensors"


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


@torch.no_grad()
def image_features(tower: CLIPVisionModelWithProjection, images: Sequence[UInt8Array]) -> Tensor:
    """Unit vectors `[N, p]` of pictures of the native size."""
    features = []
    for start in range(0, len(images), 128):
        batch = to_tensor(np.stack(images[start : start + 128]))
        features.append(tower(pixel_values=batch).image_embeds)
    return F.normalize(torch.cat(features), dim=1)


def train_classifier(
    tower: CLIPVisionModelWithProjection, images: Sequence[UInt8Array], categories: Sequence[str]
) -> nn.Linear:
    """A linear probe from image features to `CATEGORIES`."""
    rng = np.random.default_rng(1)
    features = image_features(tower, [augment(rng, image) for image in images])
    target = torch.tensor([CATEGORIES.index(category) for category in categories])
    torch.manual_seed(0)
    probe = nn.Linear(features.shape[1], len(CATEGORIES))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.05, weight_decay=1e-4)
    for _ in range(400):
        loss = F.cross_entropy(probe(features) * 4.0, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return probe.eval().requires_grad_(False)


def save_classifier(probe: nn.Linear, bundle: Path) -> None:
    """Write the probe into a bundle."""
    save_file(dict(probe.state_dict()), bundle / _PROBE_FILE)


def load_classifier(bundle: Path) -> nn.Linear:
    """The probe of a bundle."""
    state = load_file(bundle / _PROBE_FILE)
    probe = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    probe.load_state_dict(state)
    return probe.eval().requires_grad_(False)


def classify(
    tower: CLIPVisionModelWithProjection, probe: nn.Linear, images: Sequence[UInt8Array]
) -> list[str]:
    """The category of each picture."""
    chosen = probe(image_features(tower, images)).argmax(dim=1)
    return [CATEGORIES[int(index)] for index in chosen]


def classifier_accuracy(
    tower: CLIPVisionModelWithProjection, probe: nn.Linear, renders: Sequence[Render]
) -> float:
    """Share of renders whose category the probe names."""
    named = classify(tower, probe, [drawn.image for drawn in renders])
    right = [name == r.attributes["category"] for name, r in zip(named, renders, strict=True)]
    return float(np.mean(right))


def measured_colour(segmenter: Segmenter, image: UInt8Array) -> str:
    """The name of the garment's colour inside the predicted mask."""
    mask = segmenter.predict([image])[0] > 0
    return nearest_colour_name(dominant_colour(image, mask))


def generate(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], *, seed: int = 0
) -> list[UInt8Array]:
    """One picture a prompt, each from its own seed."""
    pictures = []
    for index, prompt in enumerate(prompts):
        result = pipeline(
            prompt=prompt,
            height=NATIVE_SIZE,
            width=NATIVE_SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed + index),
            output_type="np",
        )
        pictures.append((np.asarray(result.images[0]) * 255.0).round().astype(np.uint8))
    return pictures


def evaluate(bundle: Path, *, images: int = 240, renders: int = 600) -> Evaluation:
    """Measure a bundle on held-out prompts and renders."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    segmenter, probe = Segmenter.load(bundle / "segmenter"), load_classifier(bundle)
    tower = pipeline.image_encoder
    asked = held_out_prompts(images)
    generate(pipeline, [asked[0][0]])  # the first call pays for warming up
    started = time.monotonic()
    pictures = generate(pipeline, [prompt for prompt, _, _ in asked])
    seconds = (time.monotonic() - started) / images
    colours = [measured_colour(segmenter, picture) for picture in pictures]
    categories = classify(tower, probe, pictures)
    return Evaluation(
        images=images,
        colour_accuracy=_share(colours, [colour for _, colour, _ in asked]),
        category_accuracy=_share(categories, [category for _, _, category in asked]),
        classifier_accuracy=classifier_accuracy(tower, probe, held_out_renders(renders)),
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


def _share(answers: Sequence[str], truths: Sequence[str]) -> float:
    return float(np.mean([a == t for a, t in zip(answers, truths, strict=True)]))


def _errors(answers: Sequence[str], truths: Sequence[str]) -> dict[str, list[str]]:
    wrong: dict[str, list[str]] = {}
    for answer, truth in zip(answers, truths, strict=True):
        if answer != truth:
            wrong.setdefault(truth, []).append(answer)
    return wrong
