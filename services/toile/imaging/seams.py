"""Repeats of a tile: where its copies lie, and how visible the seams between them are.

A tile that repeats fills the plane. Each lattice says which of the tile's pixels lies where in
the plane, and with that everything else is said: laying copies, looking across an edge, moving
the tile's frame. The names are those of textile design.
"""

import enum

import numpy as np
import numpy.typing as npt
from PIL import Image

from toile.imaging.colours import rgb_to_lab

IntArray = npt.NDArray[np.int64]


class Repeat(enum.IntEnum):
    """The lattice on which copies lie; numbers as in `toile.v1.Repeat`."""

    STRAIGHT = 1
    """Rows and columns."""
    HALF_DROP = 2
    """Every column is half a tile lower than the one before."""
    BRICK = 3
    """Every row is half a tile further right than the one before."""


def window(
    repeat: Repeat, tile: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> tuple[IntArray, IntArray]:
    """Return which of a tile's rows and columns are seen in a window on the plane.

    Args:
        repeat: The lattice.
        tile: The tile's height and width; the side that is halved is even.
        corner: Top and left of the window, in the plane; the tile itself is at 0, 0.
        size: Height and width of the window.

    Returns:
        Rows and columns, each of the window's size, to index the tile with.
    """
    (height, width), (top, left) = tile, corner
    rows = np.arange(top, top + size[0])[:, None]
    columns = np.arange(left, left + size[1])[None, :]
    if repeat is Repeat.HALF_DROP:
        rows = rows - columns // width * (height // 2)
    elif repeat is Repeat.BRICK:
        columns = columns - rows // height * (width // 2)
    rows, columns = np.broadcast_arrays(rows % height, columns % width)
    return rows.astype(np.int64), columns.astype(np.int64)


def tile(image: Image.Image, repeat: Repeat, columns: int, rows: int) -> Image.Image:
    """Lay copies of a tile side by side; what the edge cuts off comes in on the other side."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    seen = window(repeat, (height, width), (0, 0), (rows * height, columns * width))
    return Image.fromarray(pixels[seen])


def seam_score(image: Image.Image, repeat: Repeat) -> float:
    """Say how visible the seams are when an image repeats; 1 is no seam.

    The mean distance (CIE76, in CIELAB) between pixels that meet across the tile's edges, as a
    multiple of that between neighbours inside it. Inside, steps across and down count as often
    as they do at the edges, so that stripes are not taken for seams. It cannot tell a seam from
    an edge of the picture's own that happens to lie where copies meet.
    """
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    lab = rgb_to_lab(pixels)[window(repeat, (height, width), (0, 0), (height + 1, width + 1))]
    across = np.linalg.norm(np.diff(lab[:height], axis=1), axis=-1)
    down = np.linalg.norm(np.diff(lab[:, :width], axis=0), axis=-1)
    seams = across[:, -1].sum() + down[-1].sum()
    inside = height * across[:, :-1].mean() + width * down[:-1].mean()
    if not inside:
        return 1.0  # one colour
    return float(seams / inside)
