"""The service as a whole: health, reflection, metrics, its end."""

import asyncio
import threading

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from servers.scaffold import (
    NAME,
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
    NotFoundError,
    UnavailableError,
)
from toile.core.rpc import readiness
from toile.core.rpc.client import Clients, grpc_health_check
from toile.core.rpc.server import RunningService, Service, start
from toile.core.settings import Settings
from toile.v1 import (
    rank_pb2_grpc,
)


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
