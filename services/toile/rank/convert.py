"""Between messages and what the handler works with."""

from collections.abc import Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from toile.core.catalog.models import RankingRow
from toile.scoring import Placed, Scorer
from toile.v1 import rank_pb2


def scorer_to_proto(scorer: Scorer) -> rank_pb2.Scorer:
    """Return the message of a scorer."""
    return rank_pb2.Scorer(
        name=scorer.name,
        description=scorer.description,
        default_weight=scorer.default_weight,
        needs_dataset=scorer.needs_dataset,
    )


def scored_to_proto(image: str, scores: Mapping[str, float | None]) -> rank_pb2.RankedImage:
    """Return the message of an image whose place is not known yet."""
    return rank_pb2.RankedImage(image=image, scores=_scores(scores))


def placed_to_proto(placed: Placed) -> rank_pb2.RankedImage:
    """Return the message of an image in a ranking."""
    return rank_pb2.RankedImage(
        image=placed.name,
        rank=placed.rank,
        total=placed.total,
        scores=_scores(placed.scores),
    )


def ranking_to_proto(row: RankingRow, placed: Sequence[Placed]) -> rank_pb2.Ranking:
    """Return the message of a ranking."""
    created = Timestamp()
    created.FromDatetime(row.create_time)
    return rank_pb2.Ranking(
        name=row.name,
        images=[placed_to_proto(image) for image in placed],
        scorers=[
            rank_pb2.ScorerWeight(scorer=entry["scorer"], weight=entry["weight"])
            for entry in row.scorers
        ],
        create_time=created,
    )


def _scores(scores: Mapping[str, float | None]) -> list[rank_pb2.Score]:
    return [
        rank_pb2.Score(scorer=name, value=value)
        for name, value in sorted(scores.items())
        if value is not None
    ]
