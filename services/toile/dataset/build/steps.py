"""What the Ray Data operators of a build do with each photograph.

Rows between them are `Prepared` and `Seen` as plain dictionaries: what Arrow can hold.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from toile.core.artifacts import ArtifactStore, fetch, open_store
from toile.core.errors import BadImageError, DataLossError, NotFoundError
from toile.core.settings import Settings
from toile.imaging import png
from toile.imaging.buckets import KEEP, SQUARE, bucket_crop, nearest_bucket
from toile.imaging.crop import cut_square, subject_square
from toile.imaging.decode import decode
from toile.imaging.edges import canny
from toile.imaging.similarity import perceptual_hash

if TYPE_CHECKING:
    from toile.diffusion.vision import Vision


class Source(TypedDict):
    """A photograph to build from. `index` counts from 1 in the order of import."""

    index: int
    artifact: str
    caption: str
    conditioning: str
    """Artifact of the map that was imported with it; empty without one."""


class Prepared(Source):
    """A photograph cropped, or the reason it cannot be used; bytes are PNGs, empty without one.

    `crop_left` and `crop_top` are places in the photograph as it was scaled, known in a bucket.
    """

    image: bytes
    edges: bytes
    conditioning_image: bytes
    perceptual_hash: str
    width: int
    height: int
    original_width: int
    original_height: int
    crop_left: int
    crop_top: int
    reason: str
    message: str


class Seen(Prepared):
    """A prepared photograph with what the base sees in it."""

    mask: bytes
    mask_labels: list[str]
    described: str


# One store in each worker process: a client of an object store is costly to make.
_stores: dict[str, ArtifactStore] = {}


def prepare(
    row: dict[str, Any], settings: Settings, resolution: int, aspect: str = SQUARE
) -> dict[str, Any]:
    """Read, judge, crop and trace one photograph; what is wrong with it goes into its row."""
    prepared = {
        **row,
        "image": b"",
        "edges": b"",
        "conditioning_image": b"",
        "perceptual_hash": "",
        "width": 0,
        "height": 0,
        "original_width": 0,
        "original_height": 0,
        "crop_left": 0,
        "crop_top": 0,
        "reason": "",
        "message": "",
    }
    try:
        photograph = _photograph(row["artifact"], settings)
        shown = _photograph(row["conditioning"], settings) if row.get("conditioning") else None
    except (BadImageError, DataLossError) as error:
        return {**prepared, "reason": error.reason, "message": error.message}
    except NotFoundError:
        return {**prepared, "reason": DataLossError.default_reason, "message": "its bytes are gone"}
    cut, (left, top) = _cut(photograph, resolution, aspect)
    crop = cut(photograph)
    if shown is not None:  # cut as the photograph is, of whose size it is meant to be
        shown = cut(shown.resize(photograph.size, Image.Resampling.BILINEAR))
    return {
        **prepared,
        "image": png.encode(crop),
        "conditioning_image": b"" if shown is None else png.encode(shown),
        "edges": png.encode(Image.fromarray(canny(np.asarray(crop, np.uint8)))),
        "perceptual_hash": perceptual_hash(crop),
        "width": crop.width,
        "height": crop.height,
        "original_width": photograph.width,
        "original_height": photograph.height,
        "crop_left": left,
        "crop_top": top,
    }


def _cut(
    photograph: Image.Image, resolution: int, aspect: str
) -> tuple[Callable[[Image.Image], Image.Image], tuple[int, int]]:
    """What cuts images of a photograph's size; and the cut's left and top, known in a bucket."""
    if aspect == KEEP:
        size = nearest_bucket(photograph.size, resolution)
        return lambda image: bucket_crop(image, size)[0], bucket_crop(photograph, size)[1]
    box = subject_square(photograph, least_side=resolution)
    return lambda image: cut_square(image, box, resolution), (0, 0)


class See:
    """Label the parts and write a caption, with the base's models; an actor of its own."""

    def __init__(self, settings: Settings, base_artifact: str) -> None:
        self._settings = settings
        self._base_artifact = base_artifact

    @cached_property
    def _vision(self) -> "Vision":
        # With the first batch and not in the constructor: what Ray says of an actor that could
        # not be made has lost the error's type and reason.
        from toile.diffusion.vision import Vision  # late: only this actor needs torch

        cache = self._settings.home_path / "cache"
        return Vision(fetch(open_store(self._settings), self._base_artifact, cache))

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        """Add the columns `mask`, `mask_labels` and `described` to a batch."""
        masks, described = [b""] * len(batch["image"]), [""] * len(batch["image"])
        usable = [index for index, data in enumerate(batch["image"]) if data]
        images = [decode(batch["image"][index]) for index in usable]
        labels = [self._vision.segment(image)[0] for image in images]
        for index, label_map, caption in zip(
            usable, labels, self._vision.describe_all(images, labels), strict=True
        ):
            masks[index] = png.encode(_tinted(label_map))
            described[index] = caption
        names = [self._vision.labels] * len(batch["image"])
        return {**batch, "mask": masks, "mask_labels": names, "described": described}


def _photograph(artifact: str, settings: Settings) -> Image.Image:
    url = settings.resolved_artifacts_url
    if url not in _stores:
        _stores[url] = open_store(settings)
    return decode(_stores[url].get(artifact), settings.limits)


def _tinted(label_map: npt.NDArray[np.uint8]) -> Image.Image:
    """A label map as an image whose pixel values are the labels, with colours for people."""
    image = Image.fromarray(label_map)
    image.putpalette(_PALETTE)
    return image


_COLOURS = (
    (230, 100, 90),
    (90, 160, 230),
    (240, 200, 80),
    (120, 190, 110),
    (170, 120, 210),
    (240, 150, 60),
    (90, 200, 190),
    (220, 130, 180),
)
_PALETTE = bytes(3) + bytes(
    channel for value in range(255) for channel in _COLOURS[value % len(_COLOURS)]
)
