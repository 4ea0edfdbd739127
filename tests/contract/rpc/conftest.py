"""A real server in this process and a real client of it."""

from collections.abc import AsyncIterator, Callable

import pytest

from servers.scaffold import LIMIT_BYTES, NAME, Generator, Ranker, Watched, clients_of, serving
from toile.core.errors import (
    UnavailableError,
)
from toile.core.rpc.client import Clients
from toile.core.rpc.server import RunningService, Service
from toile.core.settings import Limits, Settings
from toile.v1 import (
    generate_pb2_grpc,
    job_pb2_grpc,
    rank_pb2_grpc,
)


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


@pytest.fixture
def address(running: RunningService) -> str:
    return f"127.0.0.1:{running.port}"


@pytest.fixture
async def clients(address: str) -> AsyncIterator[Clients]:
    with clients_of(address) as clients:
        yield clients
