"""A dataset version's folder as training examples."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toile.core.errors import DataLossError

METADATA_FILE = "metadata.jsonl"

IMAGES = -1
CLASS_IMAGES = -3
"""Among the positions of `generator`: steps are 0 and more, validation's draws -2."""


Pair = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """Where an image in a bucket came from; pairs are horizontal, vertical, pixels.

    Attributes:
        size: Width and height.
        original_size: Those of the photograph.
        crop_left_top: Of the image, in the photograph as it was scaled.
    """

    size: Pair
    original_size: Pair
    crop_left_top: Pair


@dataclass(frozen=True)
class Example:
    """A training image and its caption.

    Attributes:
        path: Its file.
        file_name: Its path in the version.
        caption: What it is trained with.
        source_name: Name that it was imported under; its path where a version says none.
        mask: File of its parts' labels, 0 for the background; None where a version has none.
        frame: Of an image in a bucket; None of one that is trained on as a square.
        conditioning: File of the map that was imported with it, if one was.
    """

    path: Path
    file_name: str
    caption: str
    source_name: str
    mask: Path | None = None
    frame: Frame | None = None
    conditioning: Path | None = None

    def size(self, native_size: int) -> Pair:
        """Width and height that it is trained at, for a base of a size."""
        return (native_size, native_size) if self.frame is None else self.frame.size


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
            frame = _frame(entry)
            shown = folder / str(entry["conditioning"]) if entry.get("conditioning") else None
            examples.append(
                Example(folder / name, name, str(entry["text"]), source, mask, frame, shown)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLossError(f"the dataset version's {METADATA_FILE} cannot be read") from error
    if not examples:
        raise DataLossError(f"the dataset version's {METADATA_FILE} is empty")
    return examples


def _frame(entry: Mapping[str, Any]) -> Frame | None:
    if "original_size" not in entry:
        return None
    (width, height), (left, top) = entry["original_size"], entry["crop_left_top"]
    size = (int(entry["width"]), int(entry["height"]))
    return Frame(size, (int(width), int(height)), (int(left), int(top)))


def load_example(example: Example, native_size: int) -> Tensor:
    """An example as `[3, height, width]` in -1..1; a square if it is in no bucket.

    Raises:
        DataLossError: The file is not an image, or not of the size of its bucket.
    """
    if example.frame is None:
        return load_image(example.path, native_size)
    try:
        with Image.open(example.path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise DataLossError(f"{example.file_name} cannot be read") from error
    if image.size != example.frame.size:
        raise DataLossError(f"{example.file_name} is not of the size that its version says")
    return _as_tensor(image)


def load_image(path: Path, size: int) -> Tensor:
    """An image as `[3, size, size]` in -1..1; cropped to its middle square if it is not square.

    Raises:
        DataLossError: The file is not an image.
    """
    return _as_tensor(load_square(path, size))


def _as_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32))
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
