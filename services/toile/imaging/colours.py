"""Named colours: their sRGB values, and the name a person would give to a measured colour."""

from functools import lru_cache
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
RGB: TypeAlias = tuple[int, int, int]

NAMED_COLOURS: dict[str, RGB] = {
    "black": (28, 28, 32),
    "grey": (136, 138, 142),
    "white": (242, 242, 240),
    "red": (206, 32, 40),
    "orange": (240, 126, 28),
    "yellow": (244, 208, 48),
    "green": (46, 142, 66),
    "teal": (20, 132, 138),
    "blue": (38, 94, 204),
    "navy": (28, 38, 92),
    "purple": (122, 56, 164),
    "pink": (240, 140, 176),
    "brown": (112, 70, 42),
    "beige": (218, 198, 164),
}

# A name covers a region, not a point: lighter and darker examples of each, so that cloth in
# shade keeps its name.
_EXAMPLES: dict[str, tuple[RGB, ...]] = {
    "black": ((10, 10, 12), (45, 45, 48), (60, 58, 60)),
    "grey": ((88, 90, 92), (112, 114, 116), (166, 168, 170), (192, 194, 196)),
    "white": ((255, 255, 255), (226, 226, 226), (214, 216, 220)),
    "red": ((255, 0, 0), (160, 22, 30), (120, 18, 26), (228, 60, 58), (190, 50, 60)),
    "orange": ((220, 104, 24), (198, 92, 24), (250, 154, 70)),
    "yellow": ((222, 184, 36), (250, 226, 110), (196, 164, 36)),
    "green": (
        (24, 96, 44),
        (84, 170, 84),
        (110, 200, 110),
        (96, 120, 44),
        (20, 64, 34),
        (0, 255, 0),
    ),
    "teal": ((14, 100, 108), (56, 166, 168), (10, 74, 80)),
    "blue": (
        (28, 72, 168),
        (70, 130, 224),
        (120, 172, 232),
        (24, 60, 140),
        (60, 100, 160),
        (0, 0, 255),
    ),
    "navy": ((20, 28, 66), (34, 46, 108), (0, 0, 128)),
    "purple": ((92, 40, 128), (154, 92, 196), (184, 140, 214), (64, 28, 92)),
    "pink": ((248, 180, 204), (226, 104, 150), (214, 64, 126), (206, 120, 150)),
    "brown": ((84, 52, 32), (140, 92, 58), (158, 108, 70), (64, 42, 30)),
    "beige": ((232, 218, 190), (196, 174, 140), (206, 190, 166)),
}

_LIGHTNESS_WEIGHT = 0.7  # shading changes lightness more than hue


def rgb_to_lab(rgb: npt.ArrayLike) -> Float32Array:
    """CIELAB (D65) of sRGB values 0..255; shape `[..., 3]` is kept."""
    values = np.asarray(rgb, dtype=np.float32) / 255.0
    lab = cv2.cvtColor(values.reshape(-1, 1, 3), cv2.COLOR_RGB2LAB)
    return np.asarray(lab, dtype=np.float32).reshape(values.shape)


def lab_to_rgb(lab: npt.ArrayLike) -> RGB:
    """The sRGB triple of one CIELAB colour."""
    values = np.asarray(lab, dtype=np.float32).reshape(1, 1, 3)
    rgb = np.clip(cv2.cvtColor(values, cv2.COLOR_LAB2RGB) * 255.0, 0, 255).round()
    red, green, blue = (int(channel) for channel in rgb.reshape(3))
    return red, green, blue


def dominant_colour(image: UInt8Array, mask: npt.NDArray[np.generic] | None = None) -> RGB:
    """The colour most of the masked region has, robust to folds, prints and a ragged mask edge.

    image `[H, W, 3]` sRGB, mask `[H, W]` (non-zero counts; all pixels when None or empty).
    The mode of a coarse CIELAB histogram, refined by mean shift.
    """
    selected = (
        np.ones(image.shape[:2], dtype=np.uint8) if mask is None else (mask != 0).astype(np.uint8)
    )
    eroded = cv2.erode(selected, np.ones((3, 3), dtype=np.uint8))
    if eroded.sum() >= 0.3 * max(1, int(selected.sum())):
        selected = eroded.astype(np.uint8)
    pixels = image[selected != 0] if selected.any() else image.reshape(-1, 3)
    lab = rgb_to_lab(pixels)
    bins = np.floor(lab / np.array([14.0, 12.0, 12.0], dtype=np.float32)).astype(np.int64)
    _, inverse, counts = np.unique(bins, axis=0, return_inverse=True, return_counts=True)
    centre = lab[inverse.reshape(-1) == int(np.argmax(counts))].mean(axis=0)
    scale = np.array([0.6, 1.0, 1.0], dtype=np.float32)
    for _ in range(3):
        near = np.linalg.norm((lab - centre) * scale, axis=1) < 16.0
        centre = lab[near].mean(axis=0) if near.any() else centre
    return lab_to_rgb(centre)


def nearest_colour_name(rgb: RGB) -> str:
    """The name in `NAMED_COLOURS` whose examples lie nearest in CIELAB."""
    names, table = _example_table()
    offsets = table - rgb_to_lab(rgb)
    offsets[:, 0] *= _LIGHTNESS_WEIGHT
    return names[int(np.argmin(np.linalg.norm(offsets, axis=1)))]


@lru_cache(maxsize=1)
def _example_table() -> tuple[tuple[str, ...], Float32Array]:
    pairs = [
        (name, rgb) for name, base in NAMED_COLOURS.items() for rgb in (base, *_EXAMPLES[name])
    ]
    return tuple(name for name, _ in pairs), rgb_to_lab([rgb for _, rgb in pairs])
