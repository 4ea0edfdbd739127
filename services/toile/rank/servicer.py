"""RankService: converts messages, hands them to the handler, converts the answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from toile.rank.convert import ranking_to_proto, scored_to_proto, scorer_to_proto
from toile.rank.handler import RankHandler, Scored
from toile.v1 import rank_pb2, rank_pb2_grpc

RANK_SERVICE_NAME = rank_pb2.DESCRIPTOR.services_by_name["RankService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class RankServicer(rank_pb2_grpc.RankServiceServicer):
    """Rankings over gRPC."""

    def __init__(self, handler: RankHandler) -> None:
        self._handler = handler

    async def RankImages(
        self, request: rank_pb2.RankImagesRequest, context: Context
    ) -> AsyncIterator[rank_pb2.RankImagesResponse]:
        """Judge and order images."""
        async for event in self._handler.rank(request):
            if isinstance(event, Scored):
                scored = scored_to_proto(event.image, event.scores)
                yield rank_pb2.RankImagesResponse(scored=scored)
            else:
                ranking = ranking_to_proto(event.row, event.images)
                yield rank_pb2.RankImagesResponse(ranking=ranking)

    async def GetRanking(
        self, request: rank_pb2.GetRankingRequest, context: Context
    ) -> rank_pb2.GetRankingResponse:
        """Return a ranking."""
        found = await asyncio.to_thread(self._handler.get, request.name)
        return rank_pb2.GetRankingResponse(ranking=ranking_to_proto(found.row, found.images))

    async def ListRankings(
        self, request: rank_pb2.ListRankingsRequest, context: Context
    ) -> rank_pb2.ListRankingsResponse:
        """Page through the rankings of a project."""
        found, token = await asyncio.to_thread(
            self._handler.list, request.parent, request.page_size, request.page_token
        )
        return rank_pb2.ListRankingsResponse(
            rankings=[ranking_to_proto(one.row, one.images) for one in found],
            next_page_token=token,
        )

    async def ListScorers(
        self, request: rank_pb2.ListScorersRequest, context: Context
    ) -> rank_pb2.ListScorersResponse:
        """Return all scorers."""
        return rank_pb2.ListScorersResponse(
            scorers=[scorer_to_proto(scorer) for scorer in self._handler.scorers()]
        )
