"""Ranking: judge every image, order them, write it down once."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import RankingRow
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.names import ProjectName
from toile.core.settings import Settings
from toile.rank import records
from toile.rank.evidence import Models, Witness
from toile.rank.plan import RankPlan, make_plan
from toile.rank.references import References
from toile.scoring import SCORERS, Evidence, Need, Placed, Scorer, get_scorer, rank
from toile.scoring.ranking import check_finite
from toile.v1 import rank_pb2


@dataclass(frozen=True)
class Scored:
    """An image was judged; a score is None where its scorer had nothing to say."""

    image: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Ranked:
    """The ranking is made and stored."""

    row: RankingRow
    images: Sequence[Placed]


Event: TypeAlias = Scored | Ranked


class RankHandler:
    """Decides; knows nothing of gRPC but the request's message."""

    def __init__(
        self, settings: Settings, catalog: Catalog, store: ArtifactStore, models: Models
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._witness = Witness(settings, store, models)
        self._references = References(catalog, store, self._witness)

    async def rank(self, request: rank_pb2.RankImagesRequest) -> AsyncIterator[Event]:
        """Judge and order images. Nothing is written before the last event.

        Raises:
            InvalidArgumentError: The request is wrong.
            NotFoundError: An image or the dataset does not exist.
            FailedPreconditionError: The dataset is not built, or a score is no number.
            UnavailableError: The models, the store or the catalog are away.
        """
        answered, plan = await asyncio.to_thread(self._prepare, request)
        if answered is not None:
            for placed in answered.images:
                yield Scored(placed.name, placed.scores)
            yield answered
            return
        assert plan is not None  # noqa: S101 - one of the two, by _prepare
        references = None
        if plan.version is not None and Need.REFERENCES in plan.needs:
            references = await self._references.of(plan.version, plan.base)
        scores: dict[str, Mapping[str, float | None]] = {}
        async for row, evidence in self._witness.examine(plan, references):
            scores[row.name] = await asyncio.to_thread(_judge, row.name, evidence, plan.weights)
            yield Scored(row.name, scores[row.name])
        yield await asyncio.to_thread(self._record, request, plan, rank(scores, plan.weights))

    def get(self, name: str) -> Ranked:
        """Return a ranking.

        Raises:
            NotFoundError: There is no such ranking.
        """
        with self._catalog.reading() as session:
            return Ranked(*records.get_ranking(session, name))

    def list(self, parent: str, page_size: int, page_token: str) -> tuple[Sequence[Ranked], str]:
        """Return one page of a project's rankings, newest first, and the next page's token."""
        with self._catalog.reading() as session:
            found, token = records.list_rankings(
                session, parent=parent, page_size=page_size, page_token=page_token
            )
        return [Ranked(row, placed) for row, placed in found], token

    def scorers(self) -> Sequence[Scorer]:
        """Return all scorers, by name."""
        return tuple(SCORERS.values())

    def _prepare(
        self, request: rank_pb2.RankImagesRequest
    ) -> tuple[Ranked | None, RankPlan | None]:
        """The answer that the request had before, or else what to do."""
        with self._catalog.reading() as session:
            known = recall(session, **_identity(request))
            if known is not None:
                return Ranked(*records.get_ranking(session, known)), None
            return None, make_plan(session, self._settings, request)

    def _record(
        self, request: rank_pb2.RankImagesRequest, plan: RankPlan, placed: Sequence[Placed]
    ) -> Ranked:
        """Write the ranking, unless the same request was answered meanwhile."""
        identity = _identity(request)
        with self._catalog.transaction() as session:
            known = recall(session, **identity)
            if known is not None:
                return Ranked(*records.get_ranking(session, known))
            row = records.add_ranking(
                session, project=plan.project, placed=placed, weights=plan.weights
            )
            remember(session, resource=row.name, **identity)
        return Ranked(row, placed)


def _identity(request: rank_pb2.RankImagesRequest) -> dict[str, str]:
    project = ProjectName.parse(request.parent, "parent").project
    return {
        "scope": f"RankImages projects/{project}",
        "request_id": request.request_id,
        "digest": request_digest(request),
    }


def _judge(name: str, evidence: Evidence, scorers: Mapping[str, float]) -> dict[str, float | None]:
    scores = {scorer: get_scorer(scorer).score(evidence) for scorer in scorers}
    for scorer, value in scores.items():
        check_finite(scorer, {name: value})
    return scores
