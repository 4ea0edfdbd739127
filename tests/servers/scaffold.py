"""A tiny servicer for tests of the gRPC scaffold, and what they share."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from toile.core.context import Context, current
from toile.core.errors import (
    ExhaustedError,
    NotFoundError,
    UnavailableError,
)
from toile.core.rpc.client import Clients
from toile.core.rpc.server import RunningService, Service, start
from toile.core.settings import Settings
from toile.v1 import (
    generate_pb2,
    generate_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    rank_pb2,
    rank_pb2_grpc,
)

NAME = "toile.v1.RankService"
LIMIT_BYTES = 100_000


class Ranker(rank_pb2_grpc.RankServiceServicer):
    """Does what the name that it is asked for says."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.request_ids: list[str] = []
        self.started = threading.Event()
        self.ended = threading.Event()
        self.how_ended = ""
        self.go = asyncio.Event()
        self.failures_left = 0

    async def GetRanking(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.contexts.append(current())
        self.started.set()
        match request.name.rsplit("/", 1)[-1]:
            case "missing":
                raise NotFoundError("no such ranking", metadata={"name": request.name})
            case "bug":
                raise ValueError("the secret of /etc/shadow")
            case "slow":
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    self.how_ended = "cancelled"
                    raise
                finally:
                    self.ended.set()
            case "gated":
                await self.go.wait()
            case "self-cancelled":
                raise asyncio.CancelledError
            case "aborted":
                await context.abort(grpc.StatusCode.DATA_LOSS, "by hand")
            case "flaky" if self.failures_left:
                self.failures_left -= 1
                raise UnavailableError("try again")
            case "big":
                scorers = [rank_pb2.ScorerWeight(scorer="x" * LIMIT_BYTES)]
                return rank_pb2.GetRankingResponse(ranking=rank_pb2.Ranking(scorers=scorers))
        thread = await asyncio.to_thread(current)
        return rank_pb2.GetRankingResponse(ranking=rank_pb2.Ranking(name=thread.request_id))

    async def RankImages(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.request_ids.append(request.request_id)
        try:
            for i in range(3 if request.images else 1_000_000):
                yield rank_pb2.RankImagesResponse(scored=rank_pb2.RankedImage(rank=i))
                self.started.set()
                if request.images and i == 1:
                    raise NotFoundError("image 2 went away")
        except BaseException as error:
            self.how_ended = type(error).__name__
            raise
        finally:
            self.contexts.append(current())
            self.ended.set()


class Generator(generate_pb2_grpc.GenerateServiceServicer):
    """Counts what it is sent."""

    async def UploadImage(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        count = 0
        async for _ in request_iterator:
            count += 1
        raise ExhaustedError(f"{count} messages are too many")

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        accepted = generate_pb2.GenerationAccepted(generation=request.request_id)
        yield generate_pb2.GenerateResponse(accepted=accepted)

    async def Redesign(self, request: Any, context: Any) -> Any:  # noqa: N802
        accepted = generate_pb2.GenerationAccepted(generation=request.drawing.request_id)
        event = generate_pb2.GenerateResponse(accepted=accepted)
        yield generate_pb2.RedesignResponse(event=event)


class Watched(job_pb2_grpc.JobServiceServicer):
    """A job that ends after a second."""

    async def WatchJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        await asyncio.sleep(1.0)
        yield job_pb2.WatchJobResponse(job=job_pb2.Job(name=request.name))


@contextlib.asynccontextmanager
async def serving(service: Service, settings: Settings) -> AsyncIterator[RunningService]:
    running = await start(service, settings)
    try:
        await asyncio.wait_for(running.ready(), 20)
        yield running
    finally:
        await running.stop()


def clients_of(address: str, **settings: Any) -> Clients:
    return Clients(Settings(rank_address=address, generate_address=address, **settings))


def get(clients: Clients, ranking: str, **call: Any) -> Any:
    name = f"projects/atelier/rankings/{ranking}"
    return clients.rank.GetRanking(rank_pb2.GetRankingRequest(name=name), **call)


async def in_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of threads too
            await asyncio.sleep(0.02)
