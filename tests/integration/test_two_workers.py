"""Two workers of Ray Train train what one process trains, also killed or paused meanwhile."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from integration.ray_head import RayHead
from integration.training_platform import prepared, request_of
from toile.core.artifacts import fetch, open_store
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import JobRow, ModelVersionRow
from toile.core.jobs import JobState, JobStore, runtime
from toile.core.jobs.runtime import execute
from toile.core.settings import Settings
from toile.train.handler import TrainHandler
from toile.training import worker
from toile.training.run import train_and_publish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = {
    "sample_prompts": ["a lace dress"],
    "mixed_precision": "no",  # bf16 rounds too much to compare
}


@pytest.fixture
def settings(tmp_path: Path, tiny_bundle: Path) -> Settings:
    return prepared(tmp_path / "home", tiny_bundle)


@pytest.fixture
def catalog(settings: Settings) -> Iterator[Catalog]:
    catalog = open_catalog(settings)
    yield catalog
    catalog.close()


@pytest.fixture
def driver(ray_head: RayHead, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process the job's own."""
    # Its heartbeat would end this process if Ray took long to notice that the job is done.
    monkeypatch.setattr(runtime, "SUPERSEDED_GRACE_SECONDS", 600.0)
    monkeypatch.setenv("RAY_ADDRESS", ray_head.address)
    for name in worker._RAY_TRAIN_VARIABLES:
        monkeypatch.delenv(name, raising=False)  # put back afterwards, for `launch` sets them
    yield
    ray.shutdown()


def queued(settings: Settings, catalog: Catalog, workers: int, **config: object) -> JobRow:
    changed = settings.model_copy(update={"train_workers": workers})
    request = request_of(**CONFIG, **config)
    job = TrainHandler(changed, catalog, open_store(settings)).create(request)
    JobStore(catalog).next_attempt(job.name, after=0)
    return job


def steps(catalog: Catalog, job: JobRow, after: int = 0) -> list[int]:
    """What it told of its training, after an event."""
    events, _ = JobStore(catalog).events_after(job.name, after)
    told = [event.progress for event in events if event.progress]
    return [progress["step"] for progress in told if progress["phase"] == "train"]


@contextlib.contextmanager
def once_it_trains(catalog: Catalog, job: JobRow, act: Callable[[], object]) -> Iterator[None]:
    """Act when it is past its fourth step, while something else goes on here."""

    def wait() -> None:
        while not (done := steps(catalog, job)) or done[-1] < 5:
            time.sleep(0.05)
        act()
        acted.set()

    acted = threading.Event()
    threading.Thread(target=wait, daemon=True).start()
    yield
    assert acted.wait(10)


def losses(settings: Settings, catalog: Catalog, job: JobRow, folder: Path) -> list[float]:
    """Of each step, as the version tells."""
    ended = JobStore(catalog).get(job.name)
    assert (ended.state, ended.error_message) == (JobState.SUCCEEDED, "")
    with catalog.reading() as session:
        version = session.get_one(ModelVersionRow, job.target)
    found = fetch(open_store(settings), version.artifact, folder)
    return [json.loads(line)["loss"] for line in (found / "loss.jsonl").read_text().splitlines()]


def test_one_of_two_workers_is_killed(
    settings: Settings, catalog: Catalog, ray_head: RayHead, driver: None, tmp_path: Path
) -> None:
    short = {"steps": 16, "checkpoint_interval_steps": 4}
    alone, together = (queued(settings, catalog, workers, **short) for workers in (1, 2))

    def kill_one() -> None:
        workers = ray_head.processes("RayTrainWorker")
        assert len(workers) == 2
        workers[-1].kill()

    with once_it_trains(catalog, together, kill_one):
        assert execute(worker.launch, settings, together.name, 1) == 0
    told = steps(catalog, together)
    again = next(second for first, second in itertools.pairwise(told) if second <= first)
    assert again > 4, "they go on from a checkpoint"
    assert execute(train_and_publish, settings, alone.name, 1) == 0
    assert losses(settings, catalog, together, tmp_path / "fetched") == pytest.approx(
        losses(settings, catalog, alone, tmp_path / "fetched"), abs=1e-5
    )


def test_two_workers_that_are_paused_go_on_where_they_were(
    settings: Settings, catalog: Catalog, driver: None, tmp_path: Path
) -> None:
    """Between two checkpoints, and without doing a step again."""
    unkept = {"steps": 40, "checkpoint_interval_steps": 100}
    alone, together = (queued(settings, catalog, workers, **unkept) for workers in (1, 2))
    jobs = JobStore(catalog)
    with once_it_trains(catalog, together, lambda: jobs.request_pause(together.name)):
        execute(worker.launch, settings, together.name, 1)
    assert jobs.get(together.name).state == JobState.PAUSED
    paused = steps(catalog, together)
    assert paused[-1] < 40
    told, _ = jobs.events_after(together.name, 0)
    jobs.resume(together.name)
    ray.shutdown()  # the next attempt is a process of its own where no test plays it
    assert execute(worker.launch, settings, together.name, 2) == 0
    assert steps(catalog, together, after=told[-1].sequence)[0] > paused[-1]
    assert execute(train_and_publish, settings, alone.name, 1) == 0
    assert losses(settings, catalog, together, tmp_path / "fetched") == pytest.approx(
        losses(settings, catalog, alone, tmp_path / "fetched"), abs=1e-5
    )
