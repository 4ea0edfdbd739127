"""Fixtures that several kinds of tests share; each server lives as long as the session."""

import socketserver
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from servers import postgres

TESTS = Path(__file__).parent

# Busy machines are slow now and then; a slow example says nothing about the code.
hypothesis.settings.register_profile("toile", deadline=None)
hypothesis.settings.load_profile("toile")

LONGEST_FIRST = (
    "integration/test_platform.py",
    "integration/test_engine_export.py",
    "integration/test_loop.py",
    "integration/test_train_service.py",
    "integration/test_triton.py",
    "integration/test_serving.py",
    "integration/test_served_engines.py",
    "integration/test_bench_serve.py",
    "integration/test_chaos.py",
    "unit/training/",
    "unit/diffusion/",
)
"""Processes take files in this order, then all others: a long one at the end would leave the other
processes idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files first that take longest."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(TESTS).as_posix()
        starts = (place for place, start in enumerate(LONGEST_FIRST) if path.startswith(start))
        return next(starts, len(LONGEST_FIRST))

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def metrics_that_stop_at_once() -> Iterator[None]:
    """The standard library's servers look every half second whether they shall end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.02,))
        yield


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """SQLAlchemy URL of a real PostgreSQL."""
    pytest.importorskip("pgserver", reason="no PostgreSQL: the pgserver wheel is not installed")
    pytest.importorskip("psycopg", reason="no PostgreSQL driver: psycopg is not installed")
    with postgres.running_postgres() as url:
        yield url


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of this test's own."""
    with postgres.fresh_database(postgres_url, f"test_{uuid.uuid4().hex}") as url:
        yield url


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base bundle with the tiny base's architecture and random weights."""
    pytest.importorskip("torch", reason="the compute extra is not installed")
    from toile.diffusion.architecture import build_random_bundle

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    build_random_bundle(folder)
    return folder
