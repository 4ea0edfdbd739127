"""What becomes of jobs when the platform is told to stop."""

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from toile.cli.platform.farewells import jobs_ended
from toile.core.settings import Settings
from unit.core.jobs.fake_ray import FakeRay, fake_ray


@pytest.fixture
def ray() -> Iterator[FakeRay]:
    with fake_ray() as ray:
        ray.jobs = {
            "done-1": {"status": "SUCCEEDED"},
            "trains-1": {"status": "RUNNING"},
            "waits-1": {"status": "PENDING"},
        }
        yield ray


async def test_jobs_are_stopped_and_waited_for(ray: FakeRay) -> None:
    ray.obeys = True
    with capture_logs() as logs:
        await jobs_ended(ray.pointed_at(Settings()), 10.0)()
    assert ray.stopped == ["trains-1", "waits-1"]
    assert [line["event"] for line in logs] == ["jobs_stopped"]


async def test_the_platform_stops_without_jobs_that_do_not(ray: FakeRay) -> None:
    with capture_logs() as logs:
        await jobs_ended(ray.pointed_at(Settings()), 0.3)()
    assert ray.stopped == ["trains-1", "waits-1"]
    assert [line["event"] for line in logs] == ["jobs_not_stopped"]


async def test_and_where_ray_does_not_answer(ray: FakeRay) -> None:
    with capture_logs() as logs:
        await jobs_ended(ray.away(Settings()), 10.0)()
    assert "Ray does not answer" in logs[0]["why"]
