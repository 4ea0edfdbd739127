"""Enlarging an image and drawing its detail anew, tile by tile.

Each tile starts from the enlarged image and is redrawn at the size the base was trained for; over
what neighbours share, one fades into the next, as in the web UI's SD upscale. All tiles cut their
noise from one field, so that neighbours redraw what they share from the same start: on the tiny
base they differ there by half of what they do with noise of their own (11 levels of 255 against
23 at strength 0.3, 20 against 42 at 0.6), and fading blurs less.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from toile.diffusion.drawing import Drawing
from toile.diffusion.latents import window
from toile.diffusion.request import DiffusionRequest
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.imaging import seams
from toile.imaging.seams import Repeat

FloatArray = npt.NDArray[np.float32]

_BEYOND = 8
"""Pixels beyond the edge of a tile that repeats which Lanczos looks at; it needs 3."""


def upscale(drawing: Drawing, request: DiffusionRequest, native_size: int) -> Image.Image:
    """Enlarge the request's init image to the request's size and redraw it.

    Args:
        drawing: Draws tiles; itself without a repeat.
        request: With `upscale` and `init_image`.
        native_size: The base's, pixels.
    """
    assert request.upscale is not None  # noqa: S101 - diffuse() has seen to it
    assert request.init_image is not None  # noqa: S101
    size, overlap = (request.height, request.width), request.upscale.overlap
    start = _enlarged(request.init_image.convert("RGB"), size, request.repeat)
    tile = tile_size(size, native_size, request.repeat)
    # Tiles of an image that does not repeat end inside it, where all lattices are the same.
    lattice = request.repeat or Repeat.STRAIGHT
    sketch = _Sketch(start, lattice)
    noise = torch.randn((1, drawing.latent_channels, *_small(size)), generator=drawing.generator)
    noise = noise.to(drawing.device)
    pixels, weights = np.asarray(start), _feather(tile, overlap)
    total = np.zeros((*size, 3), np.float32)
    weight = np.zeros((*size, 1), np.float32)
    for corner in tile_corners(size, native_size, overlap, request.repeat):
        place = seams.window(lattice, size, corner, tile)
        drawing.show = partial(sketch.showing, corner, tile)
        redrawn = drawing.from_image(
            Image.fromarray(pixels[place]), window(noise, lattice, _small(corner), _small(tile))
        )
        np.add.at(total, place, weights * np.asarray(redrawn, np.float32))
        np.add.at(weight, place, weights)
        sketch.keep(corner, tile, redrawn)
    return Image.fromarray((total / weight).round().clip(0, 255).astype(np.uint8))


class _Sketch:
    """The whole image in small, one pixel for each latent: for previews."""

    def __init__(self, start: Image.Image, lattice: Repeat) -> None:
        height, width = _small((start.height, start.width))
        self._pixels = np.asarray(start.resize((width, height), Image.Resampling.BOX))
        self._lattice = lattice

    def showing(
        self, corner: tuple[int, int], tile: tuple[int, int], preview: Image.Image
    ) -> Image.Image:
        """Return it with a tile's preview in its place; corner and tile in pixels."""
        shown = self._pixels.copy()
        size = (shown.shape[0], shown.shape[1])
        shown[seams.window(self._lattice, size, _small(corner), _small(tile))] = np.asarray(preview)
        return Image.fromarray(shown)

    def keep(self, corner: tuple[int, int], tile: tuple[int, int], redrawn: Image.Image) -> None:
        """Put a tile that is done in its place."""
        height, width = _small(tile)
        small = redrawn.resize((width, height), Image.Resampling.BOX)
        self._pixels = np.asarray(self.showing(corner, tile, small))


def tile_size(size: tuple[int, int], native_size: int, repeat: Repeat | None) -> tuple[int, int]:
    """Return the height and width of the tiles of an image of that height and width.

    A tile that is larger than an image that repeats sees some of it twice.
    """
    if repeat is not None:
        return native_size, native_size
    return min(native_size, size[0]), min(native_size, size[1])


def tile_corners(
    size: tuple[int, int], native_size: int, overlap: int, repeat: Repeat | None
) -> list[tuple[int, int]]:
    """Return tops and lefts of tiles that cover an image, at multiples of 8, evenly apart.

    Those of an image that repeats go on over its edges.
    """
    tile = tile_size(size, native_size, repeat)
    tops, lefts = (
        _starts(side, length, overlap, wraps=repeat is not None)
        for side, length in zip(size, tile, strict=True)
    )
    return [(top, left) for top in tops for left in lefts]


def _starts(side: int, tile: int, overlap: int, *, wraps: bool) -> Sequence[int]:
    if wraps:
        count = math.ceil(side / (tile - overlap))
        room, gaps = side, count
    else:
        count = math.ceil(max(side - overlap, 1) / (tile - overlap)) if side > tile else 1
        room, gaps = side - tile, max(1, count - 1)
    return [index * room // gaps // PIXELS_PER_LATENT * PIXELS_PER_LATENT for index in range(count)]


def _feather(tile: tuple[int, int], overlap: int) -> FloatArray:
    """Return weights `[h, w, 1]` that rise from a tile's edges over what it shares."""

    def ramp(length: int) -> FloatArray:
        from_edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
        return np.minimum(1, from_edge / (overlap + 1)).astype(np.float32)

    return (ramp(tile[0])[:, None] * ramp(tile[1])[None, :])[..., None]


def _small(pixels: tuple[int, int]) -> tuple[int, int]:
    return pixels[0] // PIXELS_PER_LATENT, pixels[1] // PIXELS_PER_LATENT


def _enlarged(image: Image.Image, size: tuple[int, int], repeat: Repeat | None) -> Image.Image:
    height, width = size
    if repeat is None:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    own = (image.height, image.width)
    beyond = (own[0] + 2 * _BEYOND, own[1] + 2 * _BEYOND)
    padded = Image.fromarray(
        np.asarray(image)[seams.window(repeat, own, (-_BEYOND, -_BEYOND), beyond)]
    )
    box = (_BEYOND, _BEYOND, _BEYOND + own[1], _BEYOND + own[0])
    return padded.resize((width, height), Image.Resampling.LANCZOS, box=box)
