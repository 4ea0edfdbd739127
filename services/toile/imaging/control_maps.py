"""What a ControlNet sees of a picture: maps that say where, and leave open what."""

import enum

import numpy as np
import numpy.typing as npt

from toile.imaging.edges import canny

UInt8Array = npt.NDArray[np.uint8]

MAX_LABELS = 256


class ControlKind(enum.StrEnum):
    """What a map shows."""

    EDGES = "edges"
    """Canny edges, white on black: the convention of SDXL's public ControlNets."""
    PARTS = "parts"
    """The parts of a segmentation, each in a colour of its own."""
    EDGES_PARTS = "edges_parts"
    """Both in one map: edges, white, over parts."""
    GIVEN = "given"
    """What the images came with: poses, landmarks, sketches."""


EDGE = MAX_LABELS - 1
"""What a pixel of an edge is among labels; no segmenter has so many."""


def edge_map(image: UInt8Array) -> UInt8Array:
    """Return the edges of an sRGB image `[H, W, 3]`, as `[H, W, 3]`."""
    return np.repeat(canny(image)[..., None], 3, axis=2)


def part_map(labels: UInt8Array) -> UInt8Array:
    """Return labels `[H, W]` as colours `[H, W, 3]`: label 0, the background, is black."""
    return _part_colours()[labels]


def joint_labels(image: UInt8Array, labels: UInt8Array) -> UInt8Array:
    """Return labels `[H, W]` of an sRGB image `[H, W, 3]`, with `EDGE` where it has edges."""
    return np.where(canny(image) > 0, np.uint8(EDGE), labels)


def joint_map(image: UInt8Array, labels: UInt8Array) -> UInt8Array:
    """Return the edges of an sRGB image over its parts, as `[H, W, 3]`."""
    return palette(ControlKind.EDGES_PARTS)[joint_labels(image, labels)]


def palette(kind: ControlKind) -> UInt8Array:
    """What a map shows for each value, `[256, 3]`: of edges `[H, W]`, or of labels."""
    if kind is ControlKind.PARTS:
        return _part_colours()
    if kind is ControlKind.EDGES_PARTS:
        colours = _part_colours()
        colours[EDGE] = 255
        return colours
    return np.repeat(np.arange(MAX_LABELS, dtype=np.uint8)[:, None], 3, axis=1)


def _part_colours() -> UInt8Array:
    """Colours `[256, 3]` that lie far apart for low labels.

    The colour map of the PASCAL VOC devkit, which segmentation datasets have in common: bits
    3j, 3j + 1 and 3j + 2 of a label are bit 7 - j of red, green and blue.
    """
    labels = np.arange(MAX_LABELS)[:, None]
    channels = np.arange(3)
    colours = sum(((labels >> (3 * j + channels)) & 1) << (7 - j) for j in range(3))
    return np.asarray(colours, np.uint8)
