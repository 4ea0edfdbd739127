"""How calls end, and what the clients add to them."""

import asyncio
import sys
from typing import Any

import grpc
import pytest

from servers.scaffold import (
    LIMIT_BYTES,
    Ranker,
    clients_of,
    get,
    in_thread,
    serving,
    until,
)
from toile.core.errors import (
    CancelledError,
    DeadlineError,
    ExhaustedError,
    UnavailableError,
)
from toile.core.rpc.client import Clients, grpc_health_check, inference_channel
from toile.core.rpc.server import Service
from toile.core.settings import Settings
from toile.v1 import (
    generate_pb2,
    inference_pb2,
    inference_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    rank_pb2,
    rank_pb2_grpc,
)


async def test_the_client_s_deadline_ends_the_handler(clients: Clients, ranker: Ranker) -> None:
    with pytest.raises(DeadlineError):
        await in_thread(get, clients, "slow", timeout=0.5)
    await until(ranker.ended.is_set)
    assert ranker.how_ended == "cancelled"


async def test_without_a_deadline_the_default_one_holds(
    service: Service, server_settings: Settings, ranker: Ranker
) -> None:
    settings = server_settings.model_copy(update={"default_deadline_seconds": 0.3})
    async with (
        serving(service, settings) as running,
        grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel,
    ):
        stub: Any = rank_pb2_grpc.RankServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRanking(rank_pb2.GetRankingRequest(name="slow"))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.3 seconds" in (caught.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.RankImages(rank_pb2.RankImagesRequest()):
                pass
    assert ranker.ended.is_set()


async def test_a_watch_without_a_deadline_lasts_as_long_as_what_it_watches(
    service: Service, server_settings: Settings
) -> None:
    settings = server_settings.model_copy(update={"default_deadline_seconds": 0.3})
    async with serving(service, settings) as running:
        address = f"127.0.0.1:{running.port}"
        async with grpc.aio.insecure_channel(address) as channel:
            plain: Any = job_pb2_grpc.JobServiceStub(channel)
            answers = [a async for a in plain.WatchJob(job_pb2.WatchJobRequest(name="j"))]
            assert [a.job.name for a in answers] == ["j"]
        with Clients(settings.model_copy(update={"train_address": address})) as clients:
            request = job_pb2.WatchJobRequest(name="j")
            ours = await in_thread(lambda: list(clients.jobs.WatchJob(request)))
            assert [a.job.name for a in ours] == ["j"]


async def test_cancelling_reaches_the_generator(clients: Clients, ranker: Ranker) -> None:
    def read_two_and_cancel() -> None:
        call: Any = clients.rank.RankImages(rank_pb2.RankImagesRequest(parent="projects/p"))
        next(call)
        next(call)
        call.cancel()
        with pytest.raises(CancelledError):
            for _ in call:
                pass

    await in_thread(read_two_and_cancel)
    await until(ranker.ended.is_set)
    assert ranker.how_ended in ("CancelledError", "GeneratorExit")
    # The generator's last lines ran as part of the call, not somewhere else later.
    assert ranker.contexts[0].project == "p"


async def test_a_client_that_dies_in_the_middle_of_a_stream(address: str, ranker: Ranker) -> None:
    script = """
import os, sys, grpc
from toile.v1 import rank_pb2, rank_pb2_grpc
stub = rank_pb2_grpc.RankServiceStub(grpc.insecure_channel(sys.argv[1]))
for answer in stub.RankImages(rank_pb2.RankImagesRequest()):
    os._exit(3)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, address)
    assert await process.wait() == 3
    await until(ranker.ended.is_set)
    assert ranker.how_ended in ("CancelledError", "GeneratorExit")


async def test_closing_the_clients_ends_their_calls(address: str, ranker: Ranker) -> None:
    def begin_and_close() -> None:
        with clients_of(address) as clients:
            next(clients.rank.RankImages(rank_pb2.RankImagesRequest()))

    await in_thread(begin_and_close)
    await until(ranker.ended.is_set)


@pytest.mark.parametrize("ranking", ["big", "x" * LIMIT_BYTES])
async def test_too_large_a_message_is_refused(clients: Clients, ranking: str) -> None:
    with pytest.raises(ExhaustedError):
        await in_thread(get, clients, ranking)
    await in_thread(get, clients, "small")  # and the server goes on


# Clients


async def test_a_read_is_repeated_when_the_server_is_away_for_a_moment(
    clients: Clients, ranker: Ranker
) -> None:
    ranker.failures_left = 2
    await in_thread(get, clients, "flaky")
    assert ranker.failures_left == 0


async def test_a_request_gets_an_id_unless_it_has_one(clients: Clients) -> None:
    def generate(request: generate_pb2.GenerateRequest) -> str:
        return next(iter(clients.generate.Generate(request))).accepted.generation

    request = generate_pb2.GenerateRequest()
    first = await in_thread(generate, request)
    assert len(first) == 32
    assert await in_thread(generate, request) != first
    assert request.request_id == ""  # the caller's message stays as it was
    assert await in_thread(generate, generate_pb2.GenerateRequest(request_id="r")) == "r"


async def test_a_request_within_a_request_gets_the_id(clients: Clients) -> None:
    def redesign(request: generate_pb2.RedesignRequest) -> str:
        return next(iter(clients.generate.Redesign(request))).event.accepted.generation

    request = generate_pb2.RedesignRequest()
    assert len(await in_thread(redesign, request)) == 32
    assert not request.HasField("drawing")
    request.drawing.request_id = "r"
    assert await in_thread(redesign, request) == "r"


def test_nobody_at_the_address() -> None:
    with clients_of("127.0.0.1:1") as clients, pytest.raises(UnavailableError) as caught:
        get(clients, "x", timeout=10)
    assert "127.0.0.1:1" in caught.value.message
    assert caught.value.metadata == {"address": "127.0.0.1:1"}
    assert not grpc_health_check("127.0.0.1:1")


def test_no_address() -> None:
    with Clients(Settings()) as clients, pytest.raises(UnavailableError) as caught:
        clients.jobs.GetJob(job_pb2.GetJobRequest())
    assert caught.value.reason == "NO_ADDRESS"
    with pytest.raises(UnavailableError):
        inference_channel(Settings())


async def test_calls_to_the_models_name_the_application() -> None:
    seen: list[dict[str, Any]] = []

    class Models(inference_pb2_grpc.InferenceServiceServicer):
        async def EmbedTexts(self, request: Any, context: Any) -> Any:  # noqa: N802
            seen.append(dict(context.invocation_metadata()))
            return inference_pb2.EmbedTextsResponse()

        async def Diffuse(self, requests: Any, context: Any) -> Any:  # noqa: N802
            seen.append(dict(context.invocation_metadata()))
            yield inference_pb2.DiffuseResponse()

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Models(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with inference_channel(Settings(inference_address=f"127.0.0.1:{port}")) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.EmbedTexts(inference_pb2.EmbedTextsRequest())
            events = [event async for event in stub.Diffuse(iter([inference_pb2.DiffuseRequest()]))]
    finally:
        await server.stop(None)
    assert len(events) == 1
    assert [metadata["application"] for metadata in seen] == ["toile", "toile"]
    assert all(metadata["x-request-id"] for metadata in seen)
