"""What the loss of a picture weighs where: the garment's parts, as the dataset version has them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from toile.core.errors import DataLossError
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.imaging.control_maps import UInt8Array
from toile.training.caches import Cache, WeightedCache
from toile.training.checks import lacks_masks
from toile.training.config import LoraRecipeConfig
from toile.training.data import Example, middle_square


def with_masks(cache: Cache, shares: Tensor, config: LoraRecipeConfig) -> WeightedCache:
    """Add the weights of the squares that the latents are of, 1 on average over each image.

    Args:
        cache: The examples.
        shares: Of their latents, as `garment_shares` says.
        config: Says what the background counts.
    """
    return WeightedCache(**vars(cache), weights=loss_weights(shares, config.background_weight))


def garment_shares(examples: Sequence[Example], native_size: int) -> Tensor:
    """How much of each latent of examples of one size the garment covers, `[N, 1, h, w]`.

    Raises:
        FailedPreconditionError: An example has no mask (`DATASET_LACKS_MASKS`).
        DataLossError: A mask cannot be read.
    """
    width, height = (side // PIXELS_PER_LATENT for side in examples[0].size(native_size))
    return torch.stack([_share(one, height, width) for one in examples])


def loss_weights(shares: Tensor, background: float) -> Tensor:
    """Weights of latents `[N, 1, h, w]` that the garment covers by these shares, 0 to 1.

    A latent of the background weighs `background`, and one that is half garment the mean of both,
    before each image's weights are divided by their mean: so a loss keeps its size, and images
    count alike however much of them is garment. An image without any garment counts as a whole.

    Kohya's `--masked_loss` scales masks by area too, and does not divide.
    """
    weights = background + (1.0 - background) * shares
    means = weights.mean(dim=(1, 2, 3), keepdim=True)
    covered = shares.amax(dim=(1, 2, 3), keepdim=True) > 0
    return torch.where(covered, weights / means.clamp(min=1e-12), torch.ones_like(weights))


def read_labels(mask: Path, *, whole: bool = False) -> UInt8Array:
    """Return the labels of a mask's middle square, or of the whole, `[H, W]`.

    Raises:
        DataLossError: It cannot be read, or holds none.
    """
    try:
        with Image.open(mask) as file:
            labels = np.asarray(file if whole else middle_square(file))
    except OSError as error:
        raise DataLossError(f"{mask.name} of the version's masks cannot be read") from error
    if labels.ndim != 2:
        raise DataLossError(f"{mask.name} of the version's masks holds no labels")
    return labels


def _share(example: Example, height: int, width: int) -> Tensor:
    """How much of each latent the garment covers, `[1, h, w]`: label 0 is the background."""
    if example.mask is None:
        raise lacks_masks(example.file_name)
    labels = read_labels(example.mask, whole=example.frame is not None)
    garment = torch.from_numpy((labels != 0).astype(np.float32))[None, None]
    return nn.functional.interpolate(garment, (height, width), mode="area")[0]
