"""The gRPC scaffold: a real server in this process, a real client, a tiny servicer."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import pytest
import structlog
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from toile.core.context import Context, current
from toile.core.errors import (
    CancelledError,
    DeadlineError,
    ExhaustedError,
    NotFoundError,
    ToileError,
    UnavailableError,
)
from toile.core.rpc import readiness
from toile.core.rpc.client import Clients, grpc_health_check, inference_channel
from toile.core.rpc.server import RunningService, Service, start
from toile.core.settings import Limits, Settings
from toile.v1 import (
    generate_pb2,
    generate_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
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


class Watched(job_pb2_grpc.JobServiceServicer):
    """A job that ends after a second."""

    async def WatchJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        await asyncio.sleep(1.0)
        yield job_pb2.WatchJobResponse(job=job_pb2.Job(name=request.name))


@pytest.fixture
def ranker() -> Ranker:
    return Ranker()


@pytest.fixture
def problems() -> set[str]:
    """Names of the checks that fail."""
    return set()


@pytest.fixture
def service(ranker: Ranker, problems: set[str]) -> Service:
    def check(name: str) -> Callable[[], None]:
        def run() -> None:
            if name in problems:
                raise UnavailableError(f"{name} is away")

        return run

    return Service(
        name="rank",
        add=[
            (rank_pb2_grpc.add_RankServiceServicer_to_server, ranker),
            (generate_pb2_grpc.add_GenerateServiceServicer_to_server, Generator()),
            (job_pb2_grpc.add_JobServiceServicer_to_server, Watched()),
        ],
        full_names=[NAME, "toile.v1.GenerateService", "toile.v1.JobService"],
        checks={"catalog": check("catalog"), "store": check("store")},
    )


@pytest.fixture
def server_settings() -> Settings:
    return Settings(
        limits=Limits(message_bytes=LIMIT_BYTES),
        default_deadline_seconds=20.0,
        grace_seconds=10.0,
    )


@pytest.fixture
async def running(service: Service, server_settings: Settings) -> AsyncIterator[RunningService]:
    async with serving(service, server_settings) as running:
        yield running


@contextlib.asynccontextmanager
async def serving(service: Service, settings: Settings) -> AsyncIterator[RunningService]:
    running = await start(service, settings)
    try:
        await asyncio.wait_for(running.ready(), 20)
        yield running
    finally:
        await running.stop()


@pytest.fixture
def address(running: RunningService) -> str:
    return f"127.0.0.1:{running.port}"


def clients_of(address: str, **settings: Any) -> Clients:
    return Clients(Settings(rank_address=address, generate_address=address, **settings))


@pytest.fixture
async def clients(address: str) -> AsyncIterator[Clients]:
    with clients_of(address) as clients:
        yield clients


def get(clients: Clients, ranking: str, **call: Any) -> Any:
    name = f"projects/atelier/rankings/{ranking}"
    return clients.rank.GetRanking(rank_pb2.GetRankingRequest(name=name), **call)


async def in_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of threads too
            await asyncio.sleep(0.02)


# Identity


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


# Ends


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

        async def Diffuse(self, request: Any, context: Any) -> Any:  # noqa: N802
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
            events = [event async for event in stub.Diffuse(inference_pb2.DiffuseRequest())]
    finally:
        await server.stop(None)
    assert len(events) == 1
    assert [metadata["application"] for metadata in seen] == ["toile", "toile"]
    assert all(metadata["x-request-id"] for metadata in seen)


# Readiness, reflection, metrics


@pytest.fixture
def fast_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "INTERVAL_SECONDS", 0.05)


async def test_health_follows_the_checks(
    fast_checks: None, service: Service, server_settings: Settings, problems: set[str]
) -> None:
    problems.add("store")
    running = await start(service, server_settings)
    address = f"127.0.0.1:{running.port}"

    async def healthy(name: str = "") -> bool:
        return bool(await in_thread(grpc_health_check, address, name))

    try:
        assert not await healthy()
        problems.clear()
        await asyncio.wait_for(running.ready(), 20)
        assert [await healthy(name) for name in ("", NAME, "no.such.Service")] == [
            True,
            True,
            False,
        ]
        problems.add("catalog")
        await asyncio.sleep(0.5)
        assert not await healthy(NAME)
        problems.clear()
        await asyncio.sleep(0.5)
        assert await healthy(NAME)
    finally:
        await running.stop()


async def test_a_check_that_hangs_has_failed(
    fast_checks: None,
    monkeypatch: pytest.MonkeyPatch,
    ranker: Ranker,
    server_settings: Settings,
) -> None:
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 0.1)
    release = threading.Event()
    starts = []

    def hang() -> None:
        starts.append(1)
        release.wait(30)

    service = Service(
        "rank",
        [(rank_pb2_grpc.add_RankServiceServicer_to_server, ranker)],
        [NAME],
        {"hangs": hang},
    )
    running = await start(service, server_settings)
    try:
        await asyncio.sleep(0.6)
        assert not await in_thread(grpc_health_check, f"127.0.0.1:{running.port}")
        assert len(starts) == 1  # not one more thread every round
        release.set()
        await asyncio.wait_for(running.ready(), 20)
    finally:
        release.set()
        await running.stop()


async def test_reflection_lists_the_services(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
        ]
        answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    listed = {service.name for service in answers[0].list_services_response.service}
    assert {NAME, "toile.v1.GenerateService", "grpc.health.v1.Health"} <= listed
    files = answers[1].file_descriptor_response.file_descriptor_proto
    assert descriptor_pb2.FileDescriptorProto.FromString(files[0]).package == "toile.v1"


async def test_calls_are_measured(clients: Clients, running: RunningService) -> None:
    url = f"http://127.0.0.1:{running.metrics_port}/metrics"

    async def counts() -> dict[str, float]:
        async with httpx.AsyncClient() as http:
            lines = (await http.get(url)).text.splitlines()
        return {
            line.split("{")[1].split('"')[1]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("toile_rpc_duration_seconds_count") and "GetRanking" in line
        }

    before = await counts()
    await in_thread(get, clients, "x")
    with pytest.raises(NotFoundError):
        await in_thread(get, clients, "missing")
    with pytest.raises(DeadlineError):
        await in_thread(get, clients, "slow", timeout=0.3)
    await asyncio.sleep(0.3)
    after = await counts()
    assert {code: after[code] - before.get(code, 0) for code in after} == {
        **dict.fromkeys(after, 0.0),
        "OK": 1,
        "NOT_FOUND": 1,
        "DEADLINE_EXCEEDED": 1,
    }


# The end


async def test_stopping_lets_a_running_call_finish(
    service: Service, server_settings: Settings, ranker: Ranker
) -> None:
    running = await start(service, server_settings)
    await running.ready()
    address = f"127.0.0.1:{running.port}"
    with clients_of(address) as clients:
        call = asyncio.create_task(in_thread(get, clients, "gated"))
        await until(ranker.started.is_set)
        stopping = asyncio.create_task(running.stop())
        await asyncio.sleep(0.3)
        assert not stopping.done()
        assert not await in_thread(grpc_health_check, address)  # no new calls
        ranker.go.set()
        assert (await call).ranking.name
        await asyncio.wait_for(stopping, 5)


async def test_stopping_ends_what_takes_too_long(
    service: Service, server_settings: Settings, ranker: Ranker
) -> None:
    settings = server_settings.model_copy(update={"grace_seconds": 0.3})
    running = await start(service, settings)
    await running.ready()
    with clients_of(f"127.0.0.1:{running.port}") as clients:
        call = asyncio.create_task(in_thread(get, clients, "slow", timeout=20))
        await until(ranker.started.is_set)
        await asyncio.wait_for(running.stop(), 10)
        with pytest.raises((CancelledError, UnavailableError)):
            await call
    assert ranker.how_ended == "cancelled"


async def test_background_work_starts_again_after_an_error(
    ranker: Ranker, server_settings: Settings
) -> None:
    runs: list[str] = []

    async def work() -> None:
        runs.append("started")
        if len(runs) == 1:
            raise ValueError("once")
        try:
            await asyncio.sleep(60)
        finally:
            runs.append("ended")

    service = Service(
        "rank",
        [(rank_pb2_grpc.add_RankServiceServicer_to_server, ranker)],
        [NAME],
        {},
        background=[work],
    )
    async with serving(service, server_settings):
        await until(lambda: len(runs) == 2)
    assert runs == ["started", "started", "ended"]


async def test_a_taken_port_is_said(
    service: Service, server_settings: Settings, running: RunningService
) -> None:
    settings = server_settings.model_copy(update={"port": running.port})
    with pytest.raises(UnavailableError, match=str(running.port)):
        await start(service, settings)
