"""How well a drawing keeps to the map that it was drawn under."""

import cv2
import numpy as np
import numpy.typing as npt

from toile.imaging.edges import canny

UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

EDGE_TOLERANCE_PIXELS = 2.0


def edge_alignment(edges: UInt8Array, image: UInt8Array) -> float:
    """How well the edges of an image are those of a map: from 0, none of them, to 1, all.

    The boundary F-measure: the harmonic mean of the shares of the map's edge pixels that have an
    edge of the image within two pixels, and of the image's that have one of the map's. Martin et
    al., "Learning to Detect Natural Image Boundaries Using Local Brightness, Color, and Texture
    Cues", 2004, with distances in place of a one-to-one matching, as Perazzi et al., "A Benchmark
    Dataset and Evaluation Methodology for Video Object Segmentation", 2016.

    Args:
        edges: The map `[H, W]`: an edge where it is not 0.
        image: The drawing, sRGB, `[H, W, 3]`.
    """
    wanted, found = edges > 0, canny(image) > 0
    if not wanted.any() or not found.any():
        return float(wanted.any() == found.any())
    recall, precision = _share_near(wanted, found), _share_near(found, wanted)
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


def part_overlap(wanted: UInt8Array, found: UInt8Array) -> float:
    """Intersection over union of labels `[H, W]`, meant over the parts of either.

    The background, label 0, is no part: 1 where there is nothing else in both.
    """
    parts = [label for label in np.union1d(wanted, found) if label]
    overlaps = [
        np.count_nonzero((wanted == label) & (found == label))
        / np.count_nonzero((wanted == label) | (found == label))
        for label in parts
    ]
    return float(np.mean(overlaps)) if overlaps else 1.0


def silhouette_overlap(wanted: UInt8Array, found: UInt8Array) -> float:
    """Intersection over union of whatever is no background, label 0, in two label maps `[H, W]`."""
    return part_overlap((wanted > 0).astype(np.uint8), (found > 0).astype(np.uint8))


def _share_near(pixels: BoolArray, others: BoolArray) -> float:
    """Share of some pixels that lie within the tolerance of one of the others."""
    distances = cv2.distanceTransform(
        (~others).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    return float(np.mean(distances[pixels] <= EDGE_TOLERANCE_PIXELS))
