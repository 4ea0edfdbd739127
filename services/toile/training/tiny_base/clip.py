"""Stage `clip`: both text encoders and the image tower, contrastively on captioned pictures."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from toile.diffusion.architecture import (
    PROJECTION_WIDTH,
    TEXT_WIDTH,
    text_config,
    vision_config,
)
from toile.diffusion.tokenizer import write_tokenizer
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import Pictures, load_photographs, load_renders
from toile.training.tiny_base.loop import averaged_state, run_stage
from toile.training.tiny_base.vae import to_tensor

CAPTION_TOKENS = 24
_MAX_LOGIT_SCALE = 4.2


class ContrastiveTrio(nn.Module):
    """Two text encoders against one image tower.

    The first text encoder has no projection in SDXL; the one it is trained through stays here.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config(tokenizer))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer))
        self.image_encoder = CLIPVisionModelWithProjection(vision_config())
        self.projection = nn.Linear(TEXT_WIDTH, PROJECTION_WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def forward(self, token_ids: Tensor, images: Tensor) -> Tensor:
        """Mean of the two symmetric InfoNCE losses."""
        seen = self.image_encoder(pixel_values=images).image_embeds
        first = self.projection(self.text_encoder(input_ids=token_ids).pooler_output)
        second = self.text_encoder_2(input_ids=token_ids).text_embeds
        return 0.5 * (
            self._contrast(seen, first, token_ids) + self._contrast(seen, second, token_ids)
        )

    def _contrast(self, seen: Tensor, said: Tensor, token_ids: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        logits = scale * F.normalize(said.float(), dim=1) @ F.normalize(seen.float(), dim=1).T
        # Pictures that share a caption are right answers to one another, not wrong ones.
        same = (token_ids[:, None] == token_ids[None]).all(dim=2).float()
        target = same / same.sum(dim=1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


@dataclass(frozen=True)
class TrainedTrio:
    """The trained towers and their temperature (already an exponential)."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection
    logit_scale: float


def load_tokenizer(config: RecipeConfig) -> CLIPTokenizer:
    """The vocabulary, written into the workdir on first use."""
    folder = config.workdir / "tokenizer"
    if not (folder / "vocab.json").exists():
        write_tokenizer(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def train_clip(config: RecipeConfig) -> None:
    """Train the three towers together."""
    tokenizer = load_tokenizer(config)
    renders, photos = load_renders(config), load_photographs(config)
    torch.manual_seed(config.seed)
    trio = ContrastiveTrio(tokenizer)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 102, step])
        captions, images = _batch(rng, renders, photos, config)
        token_ids = tokenizer(
            captions,
            padding="max_length",
            max_length=CAPTION_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        value: Tensor = trio(token_ids, images)
        return value

    run_stage(
        "clip",
        trio,
        loss,
        config.clip,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )


def load_clip(config: RecipeConfig) -> TrainedTrio:
    """The averaged towers of the last checkpoint."""
    trio = ContrastiveTrio(load_tokenizer(config))
    trio.load_state_dict(averaged_state(config.workdir, "clip"))
    trio.eval().requires_grad_(False)
    return TrainedTrio(
        trio.text_encoder,
        trio.text_encoder_2,
        trio.image_encoder,
        float(trio.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()),
    )


def _batch(
    rng: np.random.Generator, renders: Pictures, photos: Pictures, config: RecipeConfig
) -> tuple[list[str], Tensor]:
    size = config.clip.batch_size
    from_photos = round(config.photo_share_clip * size) if len(photos.images) else 0
    captions, images = [], []
    for source, count in ((renders, size - from_photos), (photos, from_photos)):
        if count == 0:
            continue
        for index in rng.integers(len(source.images), size=count):
            captions.append(source.caption(int(index), rng))
            images.append(augment(rng, source.images[index]))
    return captions, to_tensor(np.stack(images))


def augment(
    rng: np.random.Generator, image: np.ndarray[Any, np.dtype[np.uint8]]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Flip, shift, zoom and soften a picture, so that the tower judges generated ones alike."""
    size = image.shape[0]
    scale = rng.uniform(0.9, 1.12)
    shift = rng.uniform(-0.05, 0.05, 2) * size
    half = 0.5 * size * (1.0 - scale)
    matrix = np.array([[scale, 0.0, half + shift[0]], [0.0, scale, half + shift[1]]])
    moved = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.4:
        moved = cv2.GaussianBlur(moved, (0, 0), rng.uniform(0.3, 1.3))
    return np.asarray(moved[:, ::-1] if rng.random() < 0.5 else moved, dtype=np.uint8)
