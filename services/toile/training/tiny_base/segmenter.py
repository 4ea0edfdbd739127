"""Stage `segmenter`: labels a garment's parts, from renders whose parts are known."""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  torch's own convention

from toile.diffusion.segmenter import Segmenter
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import Pictures, load_renders
from toile.training.tiny_base.loop import averaged_state, run_stage
from toile.training.tiny_base.vae import to_tensor


def train_segmenter(config: RecipeConfig) -> Segmenter:
    """Train the segmenter and give back its average."""
    renders = load_renders(config)
    torch.manual_seed(config.seed)
    segmenter = Segmenter()
    segmenter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 103, step])
        images, labels = _batch(rng, renders, config.segmenter.batch_size)
        return F.cross_entropy(segmenter(images).float(), labels)

    run_stage(
        "segmenter",
        segmenter,
        loss,
        config.segmenter,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    return load_segmenter(config)


def load_segmenter(config: RecipeConfig) -> Segmenter:
    """The averaged segmenter of the last checkpoint."""
    segmenter = Segmenter()
    segmenter.load_state_dict(averaged_state(config.workdir, "segmenter"))
    return segmenter.eval().requires_grad_(False)


def _batch(rng: np.random.Generator, renders: Pictures, size: int) -> tuple[Tensor, Tensor]:
    """Pictures softened and shifted in colour, as generated and photographed ones are."""
    images, labels = [], []
    for index in rng.integers(len(renders.images), size=size):
        image, label = renders.images[index], renders.labels[index]
        turn = cv2.getRotationMatrix2D((64, 64), rng.uniform(-12, 12), rng.uniform(0.75, 1.1))
        turn[:, 2] += rng.uniform(-6, 6, 2)
        image = cv2.warpAffine(image, turn, image.shape[:2], borderMode=cv2.BORDER_REFLECT_101)
        label = cv2.warpAffine(
            label,
            turn,
            label.shape,
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        if rng.random() < 0.5:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.5))
        tint = rng.normal(1.0, 0.08, 3) * rng.uniform(0.85, 1.1)
        noise = rng.normal(0, rng.uniform(0, 8), image.shape)
        image = np.clip(image * tint + noise, 0, 255).astype(np.uint8)
        mirrored = rng.random() < 0.5
        images.append(image[:, ::-1] if mirrored else image)
        labels.append(label[:, ::-1] if mirrored else label)
    batch = to_tensor(np.stack(images)).contiguous(memory_format=torch.channels_last)
    return batch, torch.from_numpy(np.ascontiguousarray(np.stack(labels))).long()
