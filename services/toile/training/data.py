"""A dataset version's folder as training examples."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toile.core.errors import DataLossError

METADATA_FILE = "metadata.jsonl"

IMAGES = -1
CLASS_IMAGES = -3
"""Among the positions of `generator`: steps are 0 and more, validation's draws -2."""


@dataclass(frozen=True)
class Example:
    """A training image and its caption.

    Attributes:
        path: Its file.
        file_name: Its path in the version.
        caption: What it is trained with.
        source_name: Name that it was imported under; its path where a version says none.
        mask: File of its parts' labels, 0 for the background; None where a version has none.
    """

    path: Path
    file_name: str
    caption: str
    source_name: str
    mask: Path | None = None


def read_examples(folder: Path) -> list[Example]:
    """Read a version's `metadata.jsonl`, in its order.

    Raises:
        DataLossError: The folder is not that of a published version.
    """
    examples: list[Example] = []
    try:
        lines = (folder / METADATA_FILE).read_text(encoding="utf-8").splitlines()
        for line in lines:
            entry = json.loads(line)
            name = str(entry["file_name"])
            source = str(entry.get("source_file_name", name))
            mask = folder / str(entry["mask"]) if entry.get("mask") else None
            examples.append(Example(folder / name, name, str(entry["text"]), source, mask))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLossError(f"the dataset version's {METADATA_FILE} cannot be read") from error
    if not examples:
        raise DataLossError(f"the dataset version's {METADATA_FILE} is empty")
    return examples


def load_image(path: Path, size: int) -> Tensor:
    """An image as `[3, size, size]` in -1..1; cropped to its middle square if it is not square.

    Raises:
        DataLossError: The file is not an image.
    """
    pixels = torch.from_numpy(np.asarray(load_square(path, size), dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1.0


def load_square(path: Path, size: int) -> Image.Image:
    """The middle square of an image, of `size` pixels a side, in RGB.

    Raises:
        DataLossError: The file is not an image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise DataLossError(f"{path.name} of the dataset version cannot be read") from error
    return middle_square(image).resize((size, size), Image.Resampling.LANCZOS)


def middle_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def generator(seed: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of randomness for one place in the run, the same whoever asks and whenever.

    Nothing random depends on what was drawn before, so a run that is interrupted, or shared
    among workers in another way, draws the same numbers.
    """
    text = ",".join(str(part) for part in (seed, *position))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


def batch_indices(
    count: int, batch_size: int, step: int, seed: int, *, of: int = IMAGES
) -> list[int]:
    """Examples of a step's global batch: every epoch is a fresh permutation of all `count`.

    Those `of` the images and of the class images are permuted apart.
    """
    first = step * batch_size
    indices: list[int] = []
    permutations: dict[int, list[int]] = {}
    for place in range(first, first + batch_size):
        epoch, index = divmod(place, count)
        if epoch not in permutations:
            order = torch.randperm(count, generator=generator(seed, of, epoch))
            permutations[epoch] = order.tolist()
        indices.append(permutations[epoch][index])
    return indices
