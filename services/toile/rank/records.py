"""Rankings in the catalog: written whole, in one transaction, or not at all."""

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.catalog.models import RankingRow, ScoreRow
from toile.core.catalog.paging import page
from toile.core.clock import now
from toile.core.context import new_id
from toile.core.errors import NotFoundError
from toile.core.names import ProjectName, RankingName
from toile.scoring import Placed

TOTAL = "total"
"""Scorer name under which an image's total is kept."""


def add_ranking(
    session: Session, *, project: str, placed: Sequence[Placed], weights: Mapping[str, float]
) -> RankingRow:
    """Add a ranking with all its scores."""
    row = RankingRow(
        name=str(RankingName(project, new_id())),
        project=project,
        scorers=[{"scorer": name, "weight": weight} for name, weight in weights.items()],
        create_time=now(),
    )
    session.add(row)
    session.flush()  # the scores refer to it
    session.add_all(
        ScoreRow(ranking=row.name, image=image.name, scorer=scorer, value=value, rank=image.rank)
        for image in placed
        for scorer, value in ((TOTAL, image.total), *image.scores.items())
    )
    return row


def get_ranking(session: Session, name: str) -> tuple[RankingRow, list[Placed]]:
    """Return a ranking with its images, best first.

    Raises:
        NotFoundError: There is no such ranking.
    """
    RankingName.parse(name)
    row = session.get(RankingRow, name)
    if row is None:
        raise NotFoundError(f"there is no ranking {name}", metadata={"name": name})
    return row, _placed(session, row)


def list_rankings(
    session: Session, *, parent: str, page_size: int, page_token: str
) -> tuple[list[tuple[RankingRow, list[Placed]]], str]:
    """Return one page of a project's rankings, newest first, and the next page's token."""
    project = ProjectName.parse(parent, "parent").project
    rows, token = page(
        session,
        select(RankingRow).where(RankingRow.project == project),
        (RankingRow.create_time, RankingRow.name),
        page_size=page_size,
        page_token=page_token,
        scope=f"ListRankings {parent}",
        descending=True,
    )
    return [(row, _placed(session, row)) for row in rows], token


def _placed(session: Session, ranking: RankingRow) -> list[Placed]:
    scores = session.scalars(
        select(ScoreRow)
        .where(ScoreRow.ranking == ranking.name)
        .order_by(ScoreRow.rank, ScoreRow.scorer)
    )
    values: dict[tuple[int, str], dict[str, float]] = {}
    for score in scores:
        values.setdefault((score.rank, score.image), {})[score.scorer] = score.value
    return [
        Placed(image, place, found.pop(TOTAL), found) for (place, image), found in values.items()
    ]
