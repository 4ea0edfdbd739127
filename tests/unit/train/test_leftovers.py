"""Checkpoints that nobody will go on from."""

from datetime import timedelta

import pytest

from toile.core.artifacts import ArtifactStore, publish
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.clock import now
from toile.core.errors import StoreUnavailableError
from toile.core.jobs import JobKind, JobState, JobStore
from toile.train.leftovers import Leftovers


@pytest.fixture
def leftovers(catalog: Catalog, store: ArtifactStore) -> Leftovers:
    return Leftovers(catalog, store)


def left_by(catalog: Catalog, store: ArtifactStore, state: JobState) -> str:
    """A training in a state, with a checkpoint and samples; returns its name."""
    jobs = JobStore(catalog)
    with catalog.transaction() as session:
        job = jobs.create(session, project="p", kind=JobKind.TRAINING, target="t", spec={}).name
    jobs.next_attempt(job, after=0)
    if state is not JobState.QUEUED:
        jobs.start(job, 1)
    if state is JobState.PAUSED:
        jobs.request_pause(job)
        jobs.stop(job, attempt=1)
    elif state not in (JobState.QUEUED, JobState.RUNNING):
        jobs.finish(job, state)
    publish(store, f"{job}/checkpoints/00000005", {"state.json": b"{}"})
    publish(store, f"{job}/samples/step-000005", {"00.png": b"png"})
    return job


def kept(store: ArtifactStore, job: str) -> set[str]:
    """Folders of a job that are not empty."""
    return {info.key[len(job) + 1 :].split("/")[0] for info in store.list(f"{job}/")}


@pytest.mark.parametrize("state", list(JobState))
def test_only_those_are_deleted_that_no_attempt_goes_on_from(
    leftovers: Leftovers, catalog: Catalog, store: ArtifactStore, state: JobState
) -> None:
    job = left_by(catalog, store, state)
    assert JobStore(catalog).get(job).state == state
    leftovers.sweep()
    over = state in (JobState.FAILED, JobState.CANCELLED)
    assert kept(store, job) == ({"samples"} if over else {"samples", "checkpoints"})


def test_after_the_first_sweep_only_new_ones_are_looked_at(
    leftovers: Leftovers,
    catalog: Catalog,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = left_by(catalog, store, JobState.FAILED)
    with catalog.transaction() as session:
        session.get_one(JobRow, old).end_time = now() - timedelta(days=1)
    leftovers.sweep()
    assert kept(store, old) == {"samples"}
    new, listed, list_ = left_by(catalog, store, JobState.CANCELLED), [], store.list
    monkeypatch.setattr(store, "list", lambda prefix: listed.append(prefix) or list_(prefix))
    leftovers.sweep()
    assert listed == [f"{new}/checkpoints/"]
    assert kept(store, new) == {"samples"}


def test_what_a_store_that_is_away_keeps_is_deleted_later(
    leftovers: Leftovers,
    catalog: Catalog,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = left_by(catalog, store, JobState.FAILED)
    with catalog.transaction() as session:
        session.get_one(JobRow, job).end_time = now() - timedelta(days=1)

    def away(_key: str) -> None:
        raise StoreUnavailableError("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", away)
        with pytest.raises(StoreUnavailableError):
            leftovers.sweep()
    assert kept(store, job) == {"samples", "checkpoints"}
    leftovers.sweep()
    assert kept(store, job) == {"samples"}
