"""What reaches the handler, and how errors come back."""

from typing import Any

import grpc
import pytest
import structlog

from servers.scaffold import Ranker, get, in_thread, until
from toile.core.context import Context, current
from toile.core.errors import (
    CancelledError,
    ExhaustedError,
    NotFoundError,
    ToileError,
)
from toile.core.rpc.client import Clients
from toile.v1 import (
    generate_pb2,
    generate_pb2_grpc,
    rank_pb2,
    rank_pb2_grpc,
)


async def test_identity_reaches_the_handler_and_its_threads(
    clients: Clients, ranker: Ranker
) -> None:
    answer = await in_thread(get, clients, "x", metadata=(("x-request-id", "chosen-by-me"),))
    assert ranker.contexts == [Context(request_id="chosen-by-me", project="atelier")]
    assert answer.ranking.name == "chosen-by-me"


async def test_a_client_s_request_id_is_kept_and_returned(address: str, ranker: Ranker) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = rank_pb2_grpc.RankServiceStub(channel)
        call = stub.GetRanking(
            rank_pb2.GetRankingRequest(name="x"), metadata=(("x-request-id", "mine-1"),)
        )
        assert (await call).ranking.name == "mine-1"
        assert ("x-request-id", "mine-1") in [
            tuple(item) for item in await call.trailing_metadata()
        ]
        await stub.GetRanking(
            rank_pb2.GetRankingRequest(name="x"), metadata=(("x-request-id", "no good! " * 30),)
        )
    assert len(ranker.contexts[1].request_id) == 32


async def test_the_request_id_flows_into_the_log(clients: Clients, ranker: Ranker) -> None:
    seen: list[tuple[str, str]] = []

    def note(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        seen.append((event["event"], current().request_id))
        raise structlog.DropEvent

    structlog.configure(processors=[note])
    try:
        with pytest.raises(ToileError):
            await in_thread(get, clients, "bug")
        await until(lambda: len(seen) >= 2)
    finally:
        structlog.reset_defaults()
    request_id = ranker.contexts[0].request_id
    assert request_id
    assert ("incident", request_id) in seen
    assert ("call", request_id) in seen


# Errors


async def test_a_typed_error_arrives_as_itself(clients: Clients) -> None:
    with pytest.raises(NotFoundError) as caught:
        await in_thread(get, clients, "missing")
    assert caught.value.metadata == {"name": "projects/atelier/rankings/missing"}
    assert any(note.startswith("request id ") for note in caught.value.__notes__)


async def test_a_bug_shows_its_incident_only(clients: Clients, address: str) -> None:
    with pytest.raises(ToileError, match="incident") as caught:
        await in_thread(get, clients, "bug")
    assert caught.value.reason == "INTERNAL"
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = rank_pb2_grpc.RankServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as plain:
            await stub.GetRanking(rank_pb2.GetRankingRequest(name="bug"))
    assert plain.value.code() is grpc.StatusCode.INTERNAL
    everything = repr(plain.value) + repr(plain.value.trailing_metadata())
    assert "secret" not in everything
    assert "Traceback" not in everything


async def test_a_stream_may_fail_in_the_middle(clients: Clients) -> None:
    ranks: list[int] = []

    def read() -> None:
        for answer in clients.rank.RankImages(rank_pb2.RankImagesRequest(images=["a"])):
            ranks.append(answer.scored.rank)  # noqa: PERF401 - kept when an error ends the loop

    with pytest.raises(NotFoundError, match="image 2"):
        await in_thread(read)
    assert ranks == [0, 1]


async def test_uploads_fail_typed_too(clients: Clients) -> None:
    def upload() -> None:
        messages = (generate_pb2.UploadImageRequest(chunk=b"x") for _ in range(3))
        clients.generate.UploadImage(messages)

    with pytest.raises(ExhaustedError, match="3 messages"):
        await in_thread(upload)


async def test_a_handler_may_abort_and_may_be_cancelled_from_within(clients: Clients) -> None:
    with pytest.raises(ToileError, match="by hand"):
        await in_thread(get, clients, "aborted")
    with pytest.raises(CancelledError):
        await in_thread(get, clients, "self-cancelled")


async def test_an_unknown_method_is_unimplemented(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = generate_pb2_grpc.GenerateServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetImage(generate_pb2.GetImageRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
