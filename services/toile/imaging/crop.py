"""Square crops around what a photograph shows."""

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from toile.imaging.masks import Box

UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

_SKETCH_PIXELS = 128
"""Long side of the small copy that the subject is looked for in."""

_BORDER_SHARE = 0.06
_LEAST_SUBJECT, _MOST_SUBJECT = 0.02, 0.85
_MARGIN = 1.3
"""Room around a small subject, as a factor of its longer side."""


def square_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Crop to a square around the subject and resample by area to `resolution` pixels a side."""
    return cut_square(image, subject_square(image, least_side=resolution), resolution)


def cut_square(image: Image.Image, box: Box, resolution: int) -> Image.Image:
    """Crop to a square and resample by area to `resolution` pixels a side."""
    return resample(image.crop((box.left, box.top, box.right, box.bottom)), resolution)


def subject_square(image: Image.Image, *, least_side: int = 1) -> Box:
    """The square to keep of a photograph, inside it.

    As large as the photograph allows, but closer in when the subject is small, though never
    below `least_side` pixels where the photograph has as many. A picture whose border looks
    like its middle (a swatch of cloth, a busy room) has no subject: the square is central.
    """
    width, height = image.size
    largest = min(width, height)
    subject = _subject_box(image)
    if subject is None:
        left, top = (width - largest) // 2, (height - largest) // 2
        return Box(left, top, left + largest, top + largest)
    wanted = round(_MARGIN * max(subject.width, subject.height))
    side = min(largest, max(wanted, least_side))
    left = _clamp((subject.left + subject.right - side) // 2, width - side)
    top = _clamp((subject.top + subject.bottom - side) // 2, height - side)
    return Box(left, top, left + side, top + side)


def resample(image: Image.Image, resolution: int) -> Image.Image:
    """Resize a square image: by area when shrinking, bicubic when enlarging."""
    pixels = np.asarray(image, dtype=np.uint8)
    shrinking = image.width > resolution
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return Image.fromarray(cv2.resize(pixels, (resolution, resolution), interpolation=method))


def _clamp(value: int, most: int) -> int:
    return max(0, min(value, most))


def _subject_box(image: Image.Image) -> Box | None:
    """Where pixels differ from the border's colours, in the photograph's own coordinates."""
    scale = min(1.0, _SKETCH_PIXELS / max(image.size))
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    sketch = cv2.resize(np.asarray(image, np.uint8), size, interpolation=cv2.INTER_AREA)
    subject = _subject(sketch)
    share = float(subject.mean())
    if not _LEAST_SUBJECT <= share <= _MOST_SUBJECT:
        return None
    rows, columns = subject.sum(axis=1), subject.sum(axis=0)
    top, bottom = _extent(rows)
    left, right = _extent(columns)
    across, down = image.width / size[0], image.height / size[1]
    return Box(int(left * across), int(top * down), round(right * across), round(bottom * down))


def _subject(sketch: UInt8Array) -> BoolArray:
    lab = cv2.cvtColor(cv2.GaussianBlur(sketch, (5, 5), 0), cv2.COLOR_RGB2LAB).astype(np.float32)
    height, width = lab.shape[:2]
    edge = max(1, round(_BORDER_SHARE * min(height, width)))
    # The lower edge is left out: hanging and worn garments run out of the picture there.
    border = np.concatenate(
        [lab[:edge].reshape(-1, 3), lab[:, :edge].reshape(-1, 3), lab[:, -edge:].reshape(-1, 3)]
    )
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 10, 1.0)
    cv2.setRNGSeed(0)  # the same photograph must give the same crop
    _, _, centres = cv2.kmeans(border, 2, None, criteria, 1, cv2.KMEANS_PP_CENTERS)
    distance = np.linalg.norm(lab[:, :, None, :] - centres[None, None], axis=3).min(axis=2)
    levels = np.clip(distance * 2.0, 0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    found = (levels > max(24.0, float(threshold))).astype(np.uint8)
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return np.asarray(found, np.bool_)


def _extent(counts: npt.NDArray[np.generic]) -> tuple[int, int]:
    """The span that holds all but the outermost hundredth on either side."""
    total = np.cumsum(counts, dtype=np.float64)
    first = int(np.searchsorted(total, 0.01 * total[-1]))
    last = int(np.searchsorted(total, 0.99 * total[-1]))
    return first, last + 1
