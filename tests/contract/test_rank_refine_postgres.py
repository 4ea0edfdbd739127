"""Rank and refine keep their promises on PostgreSQL as on SQLite."""

import asyncio
from pathlib import Path

from servers.platform import DATASET, PARENT, garment, running_platform
from toile.rank.__main__ import build_service as build_rank
from toile.refine.__main__ import build_service as build_refine
from toile.v1 import rank_pb2, rank_pb2_grpc, refine_pb2, refine_pb2_grpc

RED, BLUE = (206, 32, 40), (38, 94, 204)


async def test_equal_requests_make_one_ranking(tmp_path: Path, postgres_database: str) -> None:
    async with running_platform(tmp_path, build_rank, catalog_url=postgres_database) as platform:
        platform.add_dataset(garment(RED))
        images = [platform.add_image(garment(c), prompt="a red dress") for c in (RED, BLUE)]
        stub = rank_pb2_grpc.RankServiceStub(platform.channel)
        request = rank_pb2.RankImagesRequest(
            parent=PARENT, images=images, dataset=DATASET, request_id="same"
        )

        async def rank() -> rank_pb2.Ranking:
            events = [event async for event in stub.RankImages(request)]
            return events[-1].ranking

        first, *others = await asyncio.gather(*(rank() for _ in range(4)))
        assert all(other == first for other in others)
        page = await stub.ListRankings(rank_pb2.ListRankingsRequest(parent=PARENT))
        assert list(page.rankings) == [first]


async def test_equal_requests_make_one_refinement(tmp_path: Path, postgres_database: str) -> None:
    async with running_platform(tmp_path, build_refine, catalog_url=postgres_database) as platform:
        image = platform.add_image(garment(RED), prompt="a red dress")
        stub = refine_pb2_grpc.RefineServiceStub(platform.channel)
        request = refine_pb2.RefineImageRequest(
            image=image, instruction="make it blue", request_id="same"
        )

        async def refine() -> refine_pb2.Refinement:
            events = [event async for event in stub.RefineImage(request)]
            return events[-1].refinement

        first, *others = await asyncio.gather(*(refine() for _ in range(3)))
        assert all(other == first for other in others)
        page = await stub.ListRefinements(refine_pb2.ListRefinementsRequest(parent=PARENT))
        assert list(page.refinements) == [first]
