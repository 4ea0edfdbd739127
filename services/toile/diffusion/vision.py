"""What a base sees in a picture: embeddings, parts of a garment, a caption.

The models are those of the bundle: the CLIP image tower and the second text encoder, which share
one space, and the segmenter.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from toile.core.errors import FailedPreconditionError
from toile.diffusion.bundle import CPU
from toile.diffusion.loading import MAKING
from toile.diffusion.segmenter import Segmenter
from toile.imaging import masks
from toile.imaging.colours import dominant_colour, nearest_colour_name

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

_LEAST_GARMENT_SHARE = 0.04
"""Below this share of the picture the segmenter has found no garment to measure."""

_LEAST_CONFIDENCE = 0.5
"""An attribute less probable than this is left out of a caption: silence is not wrong."""

_UNSAID = frozenset({"plain"})
"""Attributes that a person would not mention."""

_BATCH = 32


class Vision:
    """The seeing half of a bundle. Models load on first use and are in fp32."""

    def __init__(
        self,
        bundle_path: Path,
        *,
        text_encoder: CLIPTextModelWithProjection | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Make it; nothing is loaded yet.

        Args:
            bundle_path: Folder of the bundle.
            text_encoder: The bundle's second one, when the caller has it loaded already.
            device: Where the models are.
        """
        self._device = device
        self._path = bundle_path
        self._shared_text_encoder = text_encoder
        self._text_cache: dict[str, Float32Array] = {}

    @cached_property
    def description(self) -> Mapping[str, Any]:
        """The bundle's `toile.json`."""
        try:
            text = (self._path / "toile.json").read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise _blind("it has no toile.json") from error
        return dict(json.loads(text))

    @property
    def labels(self) -> list[str]:
        """Names of the parts that `segment` finds; the first is "background"."""
        return list(self._segmenter.config.classes)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Float32Array:
        """Embed images: `[N, D]`, unit length."""
        parts: list[Float32Array] = []
        for start in range(0, len(images), _BATCH):
            batch = [image.convert("RGB") for image in images[start : start + _BATCH]]
            pixels = self._image_processor(images=batch, return_tensors="pt")["pixel_values"]
            parts.append(_unit(self._image_encoder(pixels.to(self._device)).image_embeds))
        return np.concatenate(parts) if parts else self._nothing

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float32Array:
        """Embed texts: `[N, D]`, unit length. What exceeds the tokenizer's length is cut off."""
        parts: list[Float32Array] = []
        for start in range(0, len(texts), _BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + _BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self._tokenizer.model_max_length,
                return_tensors="pt",
            )
            ids = tokens.input_ids.to(self._text_encoder.device)
            parts.append(_unit(self._text_encoder(ids).text_embeds))
        return np.concatenate(parts) if parts else self._nothing

    def segment(self, image: Image.Image) -> tuple[UInt8Array, list[str]]:
        """Label the parts of a garment: `[H, W]` values, indices into the names beside it."""
        pixels = np.asarray(image.convert("RGB"), np.uint8)
        return masks.clean(self._segmenter.predict([pixels])[0]), self.labels

    def describe(self, image: Image.Image) -> str:
        """Write a caption such as "white floral lace fabric", without a trigger word."""
        return self.describe_all([image])[0]

    def describe_all(
        self, images: Sequence[Image.Image], label_maps: Sequence[UInt8Array] | None = None
    ) -> list[str]:
        """Write a caption for each image; `label_maps` spare segmenting them again.

        The category, pattern and material are chosen zero-shot among the bundle's words; the
        colour is measured on the garment, where the segmenter finds one.
        """
        maps = label_maps or [self.segment(image)[0] for image in images]
        embeddings = self.embed_images(images)
        return [
            self._caption(image, labels, embedding)
            for image, labels, embedding in zip(images, maps, embeddings, strict=True)
        ]

    def _caption(self, image: Image.Image, labels: UInt8Array, embedding: Float32Array) -> str:
        category, _ = self._choose(embedding, "category", self._words("categories"))
        words = [self._colour(image, labels, embedding, category)]
        for attribute, vocabulary in (("pattern", "patterns"), ("material", "materials")):
            word, confidence = self._choose(
                embedding, attribute, self._words(vocabulary), category=category
            )
            if confidence >= _LEAST_CONFIDENCE and word not in _UNSAID:
                words.append(word)
        return " ".join([*words, category])

    def _colour(
        self, image: Image.Image, labels: UInt8Array, embedding: Float32Array, category: str
    ) -> str:
        known = self._words("colours")
        if masks.share(labels) >= _LEAST_GARMENT_SHARE:
            pixels = np.asarray(image.convert("RGB"), np.uint8)
            measured = nearest_colour_name(dominant_colour(pixels, labels))
            if measured in known:
                return measured
        return self._choose(embedding, "colour", known, category=category)[0]

    def _choose(
        self, embedding: Float32Array, attribute: str, words: Sequence[str], **context: str
    ) -> tuple[str, float]:
        """Return the likeliest word and its probability among the words."""
        template = str(self.description["caption_templates"][attribute])
        texts = [template.format(**context, **{attribute: word}) for word in words]
        similarity = self._cached_texts(texts) @ embedding
        logits = similarity * float(self.description.get("clip_logit_scale", 100.0))
        weights = np.exp(logits - logits.max())
        best = int(weights.argmax())
        return words[best], float(weights[best] / weights.sum())

    def _words(self, vocabulary: str) -> list[str]:
        words = self.description.get(vocabulary)
        if not words or "caption_templates" not in self.description:
            raise _blind(f"its toile.json has no {vocabulary} to describe pictures with")
        return [str(word) for word in words]

    def _cached_texts(self, texts: Sequence[str]) -> Float32Array:
        missing = [text for text in texts if text not in self._text_cache]
        self._text_cache.update(zip(missing, self.embed_texts(missing), strict=True))
        return np.stack([self._text_cache[text] for text in texts])

    @property
    def _nothing(self) -> Float32Array:
        return np.zeros((0, int(self._text_encoder.config.projection_dim)), np.float32)

    @cached_property
    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self._folder("tokenizer_2"))

    @cached_property
    def _text_encoder(self) -> CLIPTextModelWithProjection:
        if self._shared_text_encoder is not None:
            return self._shared_text_encoder
        folder = self._folder("text_encoder_2")
        with MAKING:
            encoder = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32)
        return encoder.to(self._device).eval()

    @cached_property
    def _image_encoder(self) -> CLIPVisionModelWithProjection:
        folder = self._folder("image_encoder")
        with MAKING:
            encoder = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
        return encoder.to(self._device).eval()

    @cached_property
    def _image_processor(self) -> CLIPImageProcessorPil:
        return CLIPImageProcessorPil.from_pretrained(self._folder("feature_extractor"))

    @cached_property
    def _segmenter(self) -> Segmenter:
        with MAKING:
            segmenter = Segmenter.load(self._folder("segmenter"))
        return segmenter.to(self._device)

    def _folder(self, name: str) -> Path:
        folder = self._path / name
        if not folder.is_dir():
            raise _blind(f"it has no {name}")
        return folder


def _unit(embeddings: torch.Tensor) -> Float32Array:
    values = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return np.asarray(values.cpu().numpy(), np.float32)


def _blind(lack: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the base cannot judge pictures: {lack}", reason="BASE_LACKS_VISION"
    )
