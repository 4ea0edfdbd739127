"""Scorers of single images, and the ranking made of their scores.

No model runs here: embeddings and masks come from whoever asks.
"""

from toile.scoring.evidence import Evidence, Need
from toile.scoring.ranking import Placed, rank
from toile.scoring.scorers import SCORERS, Scorer, default_weights, get_scorer

__all__ = [
    "SCORERS",
    "Evidence",
    "Need",
    "Placed",
    "Scorer",
    "default_weights",
    "get_scorer",
    "rank",
]
