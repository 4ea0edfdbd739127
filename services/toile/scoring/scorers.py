"""The scorers: each puts one number on one image; higher is better.

A scorer answers None when it has nothing to say about an image, such as `colour` when the prompt
names no colour. Such an image counts as average for that scorer (see `ranking`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np

from toile.core.errors import InvalidArgumentError
from toile.imaging.colour_difference import delta_e_2000
from toile.imaging.colour_words import garment_colour
from toile.imaging.colours import dominant_colour, nearest_colour_name, rgb_to_lab
from toile.scoring.evidence import BoolArray, Evidence, Need

STYLE_NEIGHBOURS = 5
"""References nearest to an image that `style` averages over."""

SHARPNESS_SIDE_PIXELS = 256
"""Larger images are shrunk to this longer side before their sharpness is measured."""

_SHARPNESS_HALF = 400.0  # variance of the Laplacian, 8-bit luminance, that scores one half
_COLOUR_FAR = 50.0  # CIEDE2000 from which on two colours have nothing in common


@dataclass(frozen=True)
class Scorer:
    """A way to put a number on an image.

    least_spread: difference between scores below which they say little: if all images of a
    request lie nearer together, the scorer's say in the ranking shrinks with the difference.
    """

    name: str
    description: str
    default_weight: float
    needs: frozenset[Need]
    least_spread: float
    function: Callable[[Evidence], float | None]

    @property
    def needs_dataset(self) -> bool:
        """Whether it compares with the images of a dataset version."""
        return Need.REFERENCES in self.needs

    def score(self, evidence: Evidence) -> float | None:
        """The score, or None when the scorer has nothing to say about the image."""
        return self.function(evidence)


def score_prompt(evidence: Evidence) -> float | None:
    """CLIP cosine of image and prompt, -1..1; None without a prompt."""
    if evidence.embedding is None or evidence.prompt_embedding is None:
        return None
    return float(evidence.embedding @ evidence.prompt_embedding)


def score_style(evidence: Evidence) -> float | None:
    """Mean CLIP cosine to the nearest images of the dataset version, -1..1."""
    if evidence.embedding is None or evidence.references is None:
        return None
    similarities = np.sort(evidence.references @ evidence.embedding)[::-1]
    return float(similarities[:STYLE_NEIGHBOURS].mean())


def score_novelty(evidence: Evidence) -> float | None:
    """One less the CLIP cosine to the nearest image of the dataset version, 0..2."""
    if evidence.embedding is None or evidence.references is None:
        return None
    return 1.0 - float((evidence.references @ evidence.embedding).max())


def score_colour(evidence: Evidence) -> float | None:
    """How well the garment has the colour that the prompt names, 0..1.

    Half for the name that a person would give to the measured colour, half for its nearness
    (CIEDE2000; 50 and more is 0). None when the prompt names no colour of the garment, or there
    is no garment to measure.
    """
    wanted = garment_colour(evidence.prompt)
    if wanted is None or evidence.garment is None or not evidence.garment.any():
        return None
    measured = dominant_colour(evidence.pixels, evidence.garment)
    difference = float(delta_e_2000(rgb_to_lab(measured), rgb_to_lab(wanted.rgb)))
    named = nearest_colour_name(measured) == wanted.name
    return 0.5 * named + 0.5 * max(0.0, 1.0 - difference / _COLOUR_FAR)


def score_sharpness(evidence: Evidence) -> float | None:
    """How crisp the garment and its outline are, 0..1; saturates, so that noise wins little."""
    mask = evidence.garment
    if mask is None or not mask.any():
        return None
    luminance = cv2.cvtColor(evidence.pixels, cv2.COLOR_RGB2GRAY)
    luminance, mask = _shrink(np.asarray(luminance, dtype=np.uint8), mask)
    outline = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), dtype=np.uint8)) != 0
    detail = cv2.Laplacian(luminance, cv2.CV_64F)[outline]
    variance = float(detail.var())
    return variance / (variance + _SHARPNESS_HALF)


def _shrink(luminance: np.ndarray, mask: BoolArray) -> tuple[np.ndarray, BoolArray]:
    height, width = luminance.shape
    scale = SHARPNESS_SIDE_PIXELS / max(height, width)
    if scale >= 1:
        return luminance, mask
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(luminance, size, interpolation=cv2.INTER_AREA)
    small_mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(small), small_mask != 0


def _registry(*scorers: Scorer) -> Mapping[str, Scorer]:
    return MappingProxyType({s.name: s for s in sorted(scorers, key=lambda s: s.name)})


SCORERS: Mapping[str, Scorer] = _registry(
    Scorer(
        "prompt",
        "shows what the prompt says (CLIP similarity of image and prompt)",
        1.0,
        frozenset({Need.EMBEDDING, Need.PROMPT_EMBEDDING}),
        0.05,
        score_prompt,
    ),
    Scorer(
        "style",
        "looks like the dataset (mean CLIP similarity to its nearest images)",
        1.0,
        frozenset({Need.EMBEDDING, Need.REFERENCES}),
        0.05,
        score_style,
    ),
    Scorer(
        "colour",
        "has the colour that the prompt names (measured inside the garment)",
        0.5,
        frozenset({Need.GARMENT}),
        0.1,
        score_colour,
    ),
    Scorer(
        "sharpness",
        "has a crisp outline and detail (variance of the Laplacian, saturating)",
        0.25,
        frozenset({Need.GARMENT}),
        0.1,
        score_sharpness,
    ),
    Scorer(
        "novelty",
        "is no copy of an image of the dataset (distance to the nearest); asked for by name",
        0.0,
        frozenset({Need.EMBEDDING, Need.REFERENCES}),
        0.02,
        score_novelty,
    ),
)
"""All scorers, by name."""


def get_scorer(name: str) -> Scorer:
    """Return a scorer.

    Raises:
        InvalidArgumentError: There is none of that name (`UNKNOWN_SCORER`).
    """
    scorer = SCORERS.get(name)
    if scorer is None:
        raise InvalidArgumentError(
            f"there is no scorer {name[:80]!r}; the scorers are {', '.join(SCORERS)}",
            field="scorers",
            reason="UNKNOWN_SCORER",
            metadata={"scorers": ",".join(SCORERS)},
        )
    return scorer


def default_weights(*, with_dataset: bool) -> dict[str, float]:
    """The scorers of a request that names none, with their weights.

    Those that compare with a dataset are left out when the request has none.
    """
    return {
        scorer.name: scorer.default_weight
        for scorer in SCORERS.values()
        if scorer.default_weight > 0 and (with_dataset or not scorer.needs_dataset)
    }
