"""Training data: shards of renders with their part masks, and photographs with simple captions."""

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from toile.diffusion.architecture import NATIVE_SIZE
from toile.imaging.colours import dominant_colour, nearest_colour_name
from toile.imaging.renderer import render, sample_spec
from toile.training.tiny_base.config import RecipeConfig

UInt8Array = npt.NDArray[np.uint8]

_ARRAYS = {
    "images.npy": (NATIVE_SIZE, NATIVE_SIZE, 3),
    "labels.npy": (NATIVE_SIZE, NATIVE_SIZE),
}
_PHOTO_NOUNS = {
    "longsleeve": "long sleeve t-shirt",
    "outwear": "jacket",
}


@dataclass(frozen=True)
class Pictures:
    """images `[N, S, S, 3]`, labels `[N, S, S]` (empty for photographs), one record each.

    A record has `captions` (one or more to pick from) and, for renders, `attributes`.
    """

    images: UInt8Array
    labels: UInt8Array
    records: Sequence[Mapping[str, Any]]

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """One of a picture's captions."""
        captions: Sequence[str] = self.records[index]["captions"]
        return str(captions[int(rng.integers(len(captions)))])


def write_renders(config: RecipeConfig) -> None:
    """Render the training set shard by shard; shards already written are kept."""
    folder = config.workdir / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    total = config.render_shards * config.renders_per_shard
    for name, shape in _ARRAYS.items():
        if not (folder / name).exists():
            np.lib.format.open_memmap(
                folder / name, mode="w+", dtype=np.uint8, shape=(total, *shape)
            ).flush()
    missing = [
        shard for shard in range(config.render_shards) if not _records(folder, shard).exists()
    ]
    # Not forked: a copy of a process with threads may wait for ever on a lock one of them held.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.threads, spawned, initializer=_one_thread) as pool:
        count, seed = config.renders_per_shard, config.seed
        list(pool.map(_write_shard, [(folder, shard, count, seed) for shard in missing]))


def _records(folder: Path, shard: int) -> Path:
    return folder / f"{shard:03d}.json"


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _write_shard(task: tuple[Path, int, int, int]) -> None:
    folder, shard, count, seed = task
    images = np.load(folder / "images.npy", mmap_mode="r+")
    labels = np.load(folder / "labels.npy", mmap_mode="r+")
    records = []
    for index in range(count):
        drawn = render(sample_spec(np.random.default_rng([seed, shard, index])), NATIVE_SIZE)
        row = shard * count + index
        images[row], labels[row] = drawn.image, drawn.labels
        records.append({"captions": list(drawn.captions), "attributes": dict(drawn.attributes)})
    images.flush()
    labels.flush()
    temporary = folder / f"{shard:03d}.part"
    temporary.write_text(json.dumps(records), encoding="utf-8")
    temporary.replace(_records(folder, shard))


def load_renders(config: RecipeConfig) -> Pictures:
    """The whole training set, its pixels mapped from disk.

    Raises:
        FileNotFoundError: the stage `renders` is not finished.
    """
    folder = config.workdir / "renders"
    records: list[Mapping[str, Any]] = []
    for shard in range(config.render_shards):
        records.extend(json.loads(_records(folder, shard).read_text(encoding="utf-8")))
    return Pictures(
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(folder / "labels.npy", mmap_mode="r"),
        records,
    )


def load_photographs(config: RecipeConfig) -> Pictures:
    """The photographs, cropped square; the folder's name is the category. Cached in the workdir."""
    empty = Pictures(
        np.empty((0, NATIVE_SIZE, NATIVE_SIZE, 3), dtype=np.uint8),
        np.empty((0, NATIVE_SIZE, NATIVE_SIZE), dtype=np.uint8),
        [],
    )
    if config.photos is None:
        return empty
    cache = config.workdir / "photos"
    if not (cache / "records.json").exists():
        _write_photographs(config.photos, cache)
    records = json.loads((cache / "records.json").read_text(encoding="utf-8"))
    return Pictures(np.load(cache / "images.npy"), empty.labels, records)


def _write_photographs(photos: Path, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    images, records = [], []
    for file in sorted(photos.glob("*/*.jpg")):
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if picture is None:
            continue
        image = _square(np.asarray(picture[..., ::-1], dtype=np.uint8))
        noun = _PHOTO_NOUNS.get(file.parent.name, file.parent.name)
        centre = np.zeros(image.shape[:2], dtype=np.uint8)
        middle = NATIVE_SIZE // 2
        cv2.ellipse(centre, (middle, middle), (middle // 2, middle // 2), 0, 0, 360, 1, -1)
        colour = nearest_colour_name(dominant_colour(image, centre))
        article = "" if noun in ("pants", "shorts", "shoes") else "a "
        coloured = f"a photo of {article}{colour} {noun}"
        images.append(image)
        records.append({"captions": [coloured, coloured, f"a photo of {article}{noun}"]})
    np.save(cache / "images.npy", np.stack(images))
    (cache / "records.json").write_text(json.dumps(records), encoding="utf-8")


def _square(image: UInt8Array) -> UInt8Array:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    small = cv2.resize(square, (NATIVE_SIZE, NATIVE_SIZE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8)
