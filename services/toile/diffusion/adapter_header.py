"""What the header of an adapter's file says: ModelSpec 1.0.1, kohya's `ss_*` keys, and our own.

Sources: the ModelSpec standard (`modelspec.*`), and the metadata that kohya's sd-scripts write
(`train_network.py`, `library/train_util.py`, `library/sai_model_spec.py`) and user interfaces show
(`ss_*`, `sshs_*`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import torch
from safetensors.torch import save

from toile import __version__
from toile.core.clock import now

ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"
CONTROL_ARCHITECTURE = "stable-diffusion-xl-v1-base/controlnet"


_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}
"""ModelSpec's words for those of diffusers' schedulers."""

_MAGNITUDES = (".dora_scale", ".lora_magnitude_vector")
_DORA = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps({"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
}
"""What sd-scripts say of a DoRA, which they train by LyCORIS; it normalises rows with the last."""


@dataclass(frozen=True)
class TrainingImages:
    """Images that an epoch shows equally often: a folder of sd-scripts'."""

    captions: Sequence[str]
    repeats: int = 1
    sizes: Sequence[tuple[int, int]] = ()
    """Width and height of each; if there are none, all are squares of the card's resolution."""


@dataclass(frozen=True)
class AdapterCard:
    """What is known of an adapter. Empty strings are left out of the header."""

    title: str
    base: str
    """`bases/{base}`"""
    base_digest: str
    """Digest of the base bundle; serving refuses the adapter on another."""
    resolution: int
    """Side of the training images, pixels."""
    trigger_word: str = ""
    dataset_version: str = ""
    dataset_digest: str = ""
    description: str = ""
    author: str = ""
    license: str = ""
    tags: Sequence[str] = ()
    prediction_type: str = ""
    """What the base predicts, as its scheduler says: `epsilon` or `v_prediction`."""
    images: Sequence[TrainingImages] = ()
    """Without those that were held out."""
    held_out_count: int = 0
    class_prompt: str = ""
    class_image_count: int = 0
    seed: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    created: datetime | None = None


def header(
    card: AdapterCard, tensors: Mapping[str, torch.Tensor], *, rank: int, alpha: float
) -> dict[str, str]:
    """Return the header of a file with these tensors."""
    facts = {**_modelspec(card), **_kohya(card, rank, alpha), **_own(card)}
    if any(name.endswith(_MAGNITUDES) for name in tensors):
        facts |= _DORA
    facts |= _hashes(tensors, {k: v for k, v in facts.items() if k.startswith("ss_")})
    return {key: value for key, value in sorted(facts.items()) if value}


def control_header(card: AdapterCard, kind: str) -> dict[str, str]:
    """Return the header of a ControlNet that is shown maps of a kind."""
    facts = {
        **_modelspec(card),
        "modelspec.architecture": CONTROL_ARCHITECTURE,
        **_own(card),
        "toile.control_kind": kind,
        "format": "pt",  # transformers and diffusers ask for it
    }
    return {key: value for key, value in sorted(facts.items()) if value}


def _modelspec(card: AdapterCard) -> dict[str, str]:
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "diffusers",
        "modelspec.title": card.title,
        "modelspec.resolution": f"{card.resolution}x{card.resolution}",
        "modelspec.description": card.description,
        "modelspec.author": card.author,
        "modelspec.date": (card.created or now()).replace(microsecond=0).isoformat(),
        "modelspec.license": card.license,
        "modelspec.trigger_phrase": card.trigger_word,
        "modelspec.usage_hint": f"Put {card.trigger_word} in the prompt."
        if card.trigger_word
        else "",
        "modelspec.tags": ", ".join(card.tags),
        "modelspec.prediction_type": _PREDICTION_TYPES.get(card.prediction_type, ""),
    }


def _kohya(card: AdapterCard, rank: int, alpha: float) -> dict[str, str]:
    facts = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": card.title,
        "ss_resolution": f"({card.resolution}, {card.resolution})",
        "ss_seed": "" if card.seed is None else str(card.seed),
        "ss_learning_rate": "" if card.learning_rate is None else str(card.learning_rate),
        "ss_steps": "" if card.steps is None else str(card.steps),
    }
    return facts | _datasets(card) if card.images else facts


def _datasets(card: AdapterCard) -> dict[str, str]:
    """What sd-scripts say of their folders, whose names begin with the repeats, if there are any.

    Counts of images include the repeats, but for `img_count`; tags are what commas part.
    """
    name = card.dataset_version.split("/")[3] if card.dataset_version.count("/") > 3 else "images"
    folders = {
        name if images.repeats == 1 else f"{images.repeats}_{name}": images
        for images in card.images
    }
    shown = sum(images.repeats * len(images.captions) for images in card.images)
    square = (card.resolution, card.resolution)
    prompt, count = card.class_prompt, card.class_image_count
    classes = {f"1_{prompt}": {"n_repeats": 1, "img_count": count}} if count else {}
    buckets: Counter[tuple[int, int]] = Counter({square: count} if count else {})
    for images in card.images:
        for size in images.sizes or [square] * len(images.captions):
            buckets[size] += images.repeats
    facts = {
        "ss_dataset_dirs": {
            folder: {"n_repeats": images.repeats, "img_count": len(images.captions)}
            for folder, images in folders.items()
        },
        "ss_reg_dataset_dirs": classes,
        "ss_tag_frequency": {
            folder: _tag_counts(images.captions) for folder, images in folders.items()
        },
        "ss_bucket_info": {
            "buckets": {
                str(number): {"resolution": size, "count": buckets[size]}
                for number, size in enumerate(sorted(buckets))
            }
        },
    }
    return {key: json.dumps(value, sort_keys=True) for key, value in facts.items()} | {
        "ss_num_train_images": str(shown),
        "ss_num_validation_images": str(card.held_out_count),
        "ss_num_reg_images": str(count),
    }


def _tag_counts(captions: Sequence[str]) -> dict[str, int]:
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def _own(card: AdapterCard) -> dict[str, str]:
    return {
        "toile.base": card.base,
        "toile.base_digest": card.base_digest,
        "toile.dataset_version": card.dataset_version,
        "toile.dataset_digest": card.dataset_digest,
        "toile.version": __version__,
    }


def _hashes(tensors: Mapping[str, torch.Tensor], ss_facts: Mapping[str, str]) -> dict[str, str]:
    """Hash the file as sd-scripts do: with the `ss_*` keys alone in its header."""
    data = save(dict(tensors), metadata=dict(ss_facts))
    start = int.from_bytes(data[:8], "little") + 8
    whole = hashlib.sha256(data[start:]).hexdigest()
    return {
        "modelspec.hash_sha256": f"0x{whole}",
        "sshs_model_hash": whole,
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }
