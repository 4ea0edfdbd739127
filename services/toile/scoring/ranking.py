"""From scores to places.

Each scorer's numbers have a range of their own, so they are normalised over the images of the
request before they are weighted: the best gets 1, the worst 0, the others lie between in
proportion. Two exceptions keep chance from deciding:

- scores that differ by less than the scorer's `least_spread` are laid around 0.5 in proportion to
  it, so equal scores are exactly 0.5 and a hair's breadth stays one;
- an image that a scorer says nothing about gets 0.5.

The total is the weighted mean, so 0..1. Equal totals are ordered by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from toile.core.errors import FailedPreconditionError
from toile.scoring.scorers import get_scorer

NEUTRAL = 0.5


@dataclass(frozen=True)
class Placed:
    """An image in a ranking; rank counts from 1."""

    name: str
    rank: int
    total: float
    scores: Mapping[str, float]


def rank(
    scores: Mapping[str, Mapping[str, float | None]], weights: Mapping[str, float]
) -> list[Placed]:
    """Order images, best first.

    Args:
        scores: For each image the score of each scorer in `weights`, or None.
        weights: Scorers with their weights, finite, at least 0, not all 0.

    Raises:
        FailedPreconditionError: A score is not a finite number (`SCORE_NOT_FINITE`).
    """
    totals = dict.fromkeys(scores, 0.0)
    for scorer, weight in weights.items():
        column = {name: values[scorer] for name, values in scores.items()}
        check_finite(scorer, column)
        for name, value in normalise(column, get_scorer(scorer).least_spread).items():
            totals[name] += weight * value
    whole = math.fsum(weights.values())
    # Rounded, so that sums that differ only by the order of addition are a tie.
    means = {name: round(min(1.0, max(0.0, total / whole)), 12) for name, total in totals.items()}
    order = sorted(means, key=lambda name: (-means[name], name))
    return [
        Placed(name, place, means[name], {k: v for k, v in scores[name].items() if v is not None})
        for place, name in enumerate(order, start=1)
    ]


def normalise(values: Mapping[str, float | None], least_spread: float) -> dict[str, float]:
    """Scores of one scorer in 0..1, as this module's text says."""
    known = [value for value in values.values() if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    middle, spread = (low + high) / 2, max(high - low, least_spread)
    return {
        name: NEUTRAL if value is None else NEUTRAL + (value - middle) / spread
        for name, value in values.items()
    }


def check_finite(scorer: str, values: Mapping[str, float | None]) -> None:
    """Refuse NaN and infinity, which no order can be made of.

    Raises:
        FailedPreconditionError: A score is not a finite number (`SCORE_NOT_FINITE`).
    """
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise FailedPreconditionError(
                f"scorer {scorer!r} gave {value} for {name}: the base's embeddings are broken",
                reason="SCORE_NOT_FINITE",
                metadata={"scorer": scorer, "image": name},
            )
