"""Stage `tower`: the image tower once more, against the now fixed second text encoder.

The contrastive stage leaves the tower weaker than the text encoders, which have far less to learn.
Here it goes on alone (so nothing a UNet is conditioned on changes), and what the renderer knows of
a picture is asked for as well: category, colour, pattern and material, by linear heads that are
thrown away.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention
from transformers import CLIPVisionModelWithProjection

from toile.diffusion.architecture import PROJECTION_WIDTH, vision_config
from toile.imaging.colours import NAMED_COLOURS
from toile.imaging.renderer.vocabulary import CATEGORIES, MATERIALS, PATTERNS
from toile.training.tiny_base.clip import (
    CAPTION_TOKENS,
    TrainedTrio,
    augment,
    load_clip,
    load_tokenizer,
)
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import Pictures, load_photographs, load_renders
from toile.training.tiny_base.loop import averaged_state, run_stage, workers
from toile.training.tiny_base.vae import to_tensor

_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    "colour": tuple(NAMED_COLOURS),
    "pattern": PATTERNS,
    "material": MATERIALS,
}
_IGNORED = -100


class TowerWithHeads(nn.Module):
    """The image tower and one linear head an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = CLIPVisionModelWithProjection(vision_config())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(PROJECTION_WIDTH, len(v)) for name, v in _ATTRIBUTES.items()}
        )


def train_tower(config: RecipeConfig) -> None:
    """Train the tower on from where the stage `clip` left it."""
    renders, photos = load_renders(config), load_photographs(config)
    tokenizer, trio = load_tokenizer(config), load_clip(config)
    torch.manual_seed(config.seed)
    tower = TowerWithHeads()
    tower.image_encoder.load_state_dict(trio.image_encoder.state_dict())
    rank, _ = workers()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 106, step, rank])
        captions, images, answers = _batch(rng, renders, photos, config)
        token_ids = tokenizer(
            captions,
            padding="max_length",
            max_length=CAPTION_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            said = trio.text_encoder_2(input_ids=token_ids).text_embeds
        said = F.normalize(said.float(), dim=1)
        seen = tower.image_encoder(pixel_values=images).image_embeds
        total = _contrast(trio, token_ids, F.normalize(seen.float(), dim=1), said)
        for name, head in tower.heads.items():
            total = total + 0.5 * F.cross_entropy(
                head(seen).float(), answers[name], ignore_index=_IGNORED
            )
        return total

    run_stage(
        "tower",
        tower,
        loss,
        config.tower,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )


def load_image_encoder(config: RecipeConfig) -> CLIPVisionModelWithProjection:
    """The tower of this stage, or of the stage `clip` while this one has not begun."""
    if not (config.workdir / "tower" / "checkpoint.safetensors").exists():
        return load_clip(config).image_encoder
    tower = TowerWithHeads()
    tower.load_state_dict(averaged_state(config.workdir, "tower"))
    return tower.image_encoder.eval().requires_grad_(False)


def _contrast(trio: TrainedTrio, token_ids: Tensor, seen: Tensor, said: Tensor) -> Tensor:
    logits = trio.logit_scale * said @ seen.T
    # Pictures that share a caption are right answers to one another, not wrong ones.
    same = (token_ids[:, None] == token_ids[None]).all(dim=2).float()
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def _batch(
    rng: np.random.Generator, renders: Pictures, photos: Pictures, config: RecipeConfig
) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    size = config.tower.batch_size
    from_photos = round(config.photo_share_clip * size) if len(photos.images) else 0
    captions, images = [], []
    answers: dict[str, list[int]] = {name: [] for name in _ATTRIBUTES}
    for source, count in ((renders, size - from_photos), (photos, from_photos)):
        for index in rng.integers(max(1, len(source.images)), size=count):
            captions.append(source.caption(int(index), rng))
            images.append(augment(rng, source.images[index]))
            known = source.records[index].get("attributes", {})
            for name, values in _ATTRIBUTES.items():
                answers[name].append(values.index(known[name]) if name in known else _IGNORED)
    tensors = {name: torch.tensor(values) for name, values in answers.items()}
    return captions, to_tensor(np.stack(images)), tensors
