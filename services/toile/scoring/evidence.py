"""What a scorer may look at."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]

JUDGED_SIDE_PIXELS = 512
"""Images are judged at most this large: what the models see, and what a message holds."""


class Need(Enum):
    """Evidence that a model must be asked for, so that nobody asks for what no scorer reads."""

    EMBEDDING = auto()
    PROMPT_EMBEDDING = auto()
    GARMENT = auto()
    REFERENCES = auto()


@dataclass(frozen=True)
class Evidence:
    """One image and what the models say about it; None where it was not asked for.

    pixels: `[H, W, 3]` sRGB. prompt: what it should show; empty when nobody said. embedding `[D]`
    and prompt_embedding `[D]`: CLIP, unit length. garment `[H, W]`: where the garment is.
    references `[N, D]`: embeddings of the dataset version's images.
    """

    pixels: UInt8Array
    prompt: str = ""
    embedding: FloatArray | None = None
    prompt_embedding: FloatArray | None = None
    garment: BoolArray | None = None
    references: FloatArray | None = None
