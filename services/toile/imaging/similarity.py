"""Near-duplicates: pictures that are the same photograph again, resized or compressed."""

from collections.abc import Sequence

import imagehash
import numpy as np
from PIL import Image

NEAR_BITS = 4
"""Hashes of 64 bits that differ in no more than this are taken for the same picture."""


def perceptual_hash(image: Image.Image) -> str:
    """The 64-bit DCT hash of an image, as 16 hexadecimal digits."""
    return str(imagehash.phash(image))


def group_near_duplicates(hashes: Sequence[str], *, near_bits: int = NEAR_BITS) -> list[list[int]]:
    """Indices of pictures that belong together, in groups of two or more.

    Groups are chained (a like b, b like c: one group), ordered by their first member.
    """
    words = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    group = list(range(len(words)))
    for index in range(1, len(words)):
        differences = np.bitwise_count(words[:index] ^ words[index])
        for other in np.flatnonzero(differences <= near_bits):
            merged = sorted({group[int(other)], group[index]})
            group = [merged[0] if member == merged[-1] else member for member in group]
    members: dict[int, list[int]] = {}
    for index, first in enumerate(group):
        members.setdefault(first, []).append(index)
    return [indices for indices in members.values() if len(indices) > 1]
