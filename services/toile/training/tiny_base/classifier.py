"""Stage `classifier`: a small convolutional judge of categories, for the evaluation alone.

It shares nothing with the networks it judges: neither weights nor the captions' training.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention

from toile.imaging.renderer.vocabulary import CATEGORIES
from toile.training.tiny_base.clip import augment
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.data import load_renders
from toile.training.tiny_base.loop import averaged_state, run_stage
from toile.training.tiny_base.vae import to_tensor

UInt8Array = npt.NDArray[np.uint8]

_SIDE = 64
_WIDTHS = (24, 48, 72, 96)
_FILE = "classifier.safetensors"


class CategoryClassifier(nn.Module):
    """Pictures `[B, 3, 64, 64]` in -1..1 to logits over `CATEGORIES`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, groups=8),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(_WIDTHS[-1] * 16, len(CATEGORIES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits

    @torch.no_grad()
    def name(self, images: Sequence[UInt8Array]) -> list[str]:
        """The category of each picture `[H, W, 3]`."""
        chosen = self(to_tensor(np.stack([_small(image) for image in images]))).argmax(dim=1)
        return [CATEGORIES[int(index)] for index in chosen]


def _small(image: UInt8Array) -> UInt8Array:
    shrunk = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(shrunk, dtype=np.uint8)


def train_classifier(config: RecipeConfig) -> None:
    """Train the judge on renders, softened, shifted and mirrored."""
    renders = load_renders(config)
    torch.manual_seed(config.seed)
    classifier = CategoryClassifier()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 108, step])
        chosen = rng.integers(len(renders.images), size=config.classifier.batch_size)
        images = np.stack([_small(augment(rng, renders.images[index])) for index in chosen])
        names = [renders.records[index]["attributes"]["category"] for index in chosen]
        target = torch.tensor([CATEGORIES.index(name) for name in names])
        return F.cross_entropy(classifier(to_tensor(images)).float(), target)

    run_stage(
        "classifier",
        classifier,
        loss,
        config.classifier,
        config.workdir,
        checkpoint_seconds=config.checkpoint_seconds,
    )


def save_classifier(config: RecipeConfig) -> None:
    """Put the trained judge into the bundle, in half precision."""
    state = averaged_state(config.workdir, "classifier")
    save_file({name: t.half().contiguous() for name, t in state.items()}, config.bundle / _FILE)


def load_classifier(bundle: Path) -> CategoryClassifier:
    """The judge of a bundle."""
    classifier = CategoryClassifier()
    state = load_file(bundle / _FILE)
    classifier.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return classifier.eval().requires_grad_(False)
