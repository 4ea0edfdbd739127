"""A store that is away, or full, in the middle of a training costs time and nothing else."""

import contextlib
import errno
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tenacity
import torch
from pydantic import SecretStr
from safetensors import SafetensorError

from integration.training_platform import prepare, request_of, settings_for
from servers import swift_s3
from servers.swift_s3 import running_swift
from toile.core.artifacts import fetch, open_store
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import JobRow, ModelVersionRow
from toile.core.errors import CatalogUnavailableError, StoreUnavailableError
from toile.core.jobs import JobState, JobStore
from toile.core.jobs.runtime import JobContext, execute
from toile.core.settings import S3Settings, Settings
from toile.diffusion.adapters import load_lora
from toile.train.handler import TrainHandler
from toile.training import events, patience, publish, run
from toile.training.run import train_and_publish
from unit.training.event_files import shown

pytestmark = pytest.mark.usefixtures("quick_samples")

MEBIBYTE = 1 << 20
Told = list[tuple[str, str]]
Caplog = pytest.LogCaptureFixture


@pytest.fixture
def settings(tmp_path: Path, tiny_bundle: Path) -> Settings:
    """A platform whose artifacts lie in a folder of their own."""
    settings = settings_for(tmp_path / "home", "").model_copy(
        update={"artifacts_url": (tmp_path / "artifacts").as_uri()}
    )
    prepare(settings, tiny_bundle)
    return settings


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Have a folder on a disk of its own."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of the artifacts, on a disk with some room beside the base."""
    with small_disk(tmp_path / "artifacts", "160m") as folder:
        yield folder


def fill(folder: Path) -> Path:
    """Fill a folder's disk; returns the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MEBIBYTE))
        except OSError:
            pass
    return filler


def events_of(settings: Settings, catalog: Catalog, job: JobRow, folder: Path) -> list[int]:
    """Steps whose loss a version's TensorBoard shows."""
    with catalog.reading() as session:
        version = session.get_one(ModelVersionRow, job.target)
    found = fetch(open_store(settings), version.artifact, folder)
    return [step for step, _ in shown(found / "tensorboard")["loss"]]


def trained(settings: Settings, catalog: Catalog) -> JobRow:
    """Run a small training to its end."""
    jobs = JobStore(catalog)
    config = {"steps": 4, "checkpoint_interval_steps": 2, "sample_prompts": ["a lace dress"]}
    row = TrainHandler(settings, catalog, open_store(settings)).create(request_of(**config))
    jobs.next_attempt(row.name, after=0)
    assert execute(train_and_publish, settings, row.name, 1) == 0
    return jobs.get(row.name)


def weights(
    settings: Settings, catalog: Catalog, job: JobRow, folder: Path
) -> dict[str, torch.Tensor]:
    assert (job.state, job.error_message) == (JobState.SUCCEEDED, "")
    with catalog.reading() as session:
        version = session.get_one(ModelVersionRow, job.target)
    return load_lora(fetch(open_store(settings), version.artifact, folder)).peft_state()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What was said when work was to be tried again, after no pause."""
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    return []


def when_told(monkeypatch: pytest.MonkeyPatch, told: Told, mend: Callable[[], object]) -> None:
    def tell(job: JobContext, phase: str, *_: int, message: str) -> None:
        told.append((phase, message))
        mend()

    monkeypatch.setattr(patience, "report", tell)


def when_training(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], object]) -> None:
    """Do something after the first step."""
    begun: list[int] = []

    def tell(job: JobContext, phase: str, step: int, *_: object, **__: object) -> None:
        if phase == "train" and not begun:
            begun.append(step)
            spoil()

    monkeypatch.setattr(run, "report", tell)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def test_a_full_disk_costs_checkpoints_and_a_wait(
    on_a_small_disk: Path,
    settings: Settings,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    catalog = open_catalog(settings)
    undisturbed = weights(settings, catalog, trained(settings, catalog), tmp_path / "first")
    when_training(monkeypatch, lambda: fill(on_a_small_disk))
    when_told(monkeypatch, told, (on_a_small_disk / "filler").unlink)
    with caplog.at_level(logging.WARNING):
        job = trained(settings, catalog)
    assert same(undisturbed, weights(settings, catalog, job, tmp_path / "second"))
    assert [phase for phase, _ in told] == ["publish"]
    assert "space" in told[0][1]
    assert "no checkpoint at step 2" in caplog.text
    catalog.close()


def test_a_full_disk_under_the_home_costs_events(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    catalog = open_catalog(settings)
    with small_disk(settings.home_path / "tensorboard", "64k") as folder:
        when_training(monkeypatch, fill(folder).unlink)
        job = trained(settings, catalog)
        assert weights(settings, catalog, job, tmp_path / "fetched")
        assert events_of(settings, catalog, job, tmp_path / "fetched") == [2, 3, 4]
    catalog.close()


def test_events_that_find_no_room_are_all_that_is_lost(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """The same where nothing can be mounted."""
    catalog = open_catalog(settings)
    write = events._EventFile.write

    def full(file: events._EventFile, step: int, *values: Any) -> None:
        if step in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, step, *values)

    monkeypatch.setattr(events._EventFile, "write", full)
    job = trained(settings, catalog)
    assert weights(settings, catalog, job, tmp_path / "fetched")
    assert events_of(settings, catalog, job, tmp_path / "fetched") == [1, 4]
    assert "events are lost from step 2 on" in caplog.text
    catalog.close()


def test_a_full_disk_under_a_finished_training_is_waited_for(
    settings: Settings, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The version's files are written beside the store, by libraries with errors of their own."""
    catalog = open_catalog(settings)
    export, failures = (
        publish._export,
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ],
    )

    def full(*arguments: object) -> None:
        export(*arguments)  # type: ignore[arg-type]
        if failures:
            raise failures.pop()

    monkeypatch.setattr(publish, "_export", full)
    when_told(monkeypatch, told, lambda: None)
    assert weights(settings, catalog, trained(settings, catalog), tmp_path / "fetched")
    assert [phase for phase, _ in told] == ["publish"] * 2
    catalog.close()


@pytest.mark.parametrize("moment", ["prepare", "publish"])
def test_a_store_that_is_away_for_a_while_is_waited_for(
    settings: Settings, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    catalog = open_catalog(settings)
    artifacts, away = tmp_path / "artifacts", tmp_path / "away"
    if moment == "publish":
        when_training(monkeypatch, lambda: artifacts.rename(away))
    else:
        first = patience.patiently

        def leave_once(*arguments: object) -> object:
            if artifacts.exists() and not told:
                artifacts.rename(away)
            return first(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(run, "patiently", leave_once)

    def come_back() -> None:
        if len(told) == 3:
            away.rename(artifacts)

    when_told(monkeypatch, told, come_back)
    job = trained(settings, catalog)
    assert weights(settings, catalog, job, tmp_path / "fetched")
    assert [phase for phase, _ in told] == [moment] * 3
    catalog.close()


def test_an_object_store_that_is_away_costs_checkpoints_and_a_wait(
    told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bundle: Path, caplog: Caplog
) -> None:
    """A real one, from the first step until the version is to be published."""
    pytest.importorskip("swift", reason="no S3 server: the swift package is not installed")
    with running_swift() as server:
        s3 = S3Settings(
            endpoint=server.endpoint,
            access_key=swift_s3.ACCESS_KEY,
            secret_key=SecretStr(swift_s3.SECRET_KEY),
            secure=False,
        )
        settings = settings_for(tmp_path / "home", "").model_copy(
            update={"artifacts_url": "s3", "s3": s3}
        )
        prepare(settings, tiny_bundle)
        catalog = open_catalog(settings)
        undisturbed = weights(settings, catalog, trained(settings, catalog), tmp_path / "first")

        def come_back() -> None:
            if len(told) == 2:
                server.start()

        when_training(monkeypatch, server.stop)
        when_told(monkeypatch, told, come_back)
        job = trained(settings, catalog)
        assert same(undisturbed, weights(settings, catalog, job, tmp_path / "second"))
        assert [phase for phase, _ in told] == ["publish"] * 2
        assert "no checkpoint at step 2" in caplog.text
        catalog.close()


def test_what_is_away_for_a_minute_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def work() -> str:
        if now[0] < 60:
            raise StoreUnavailableError("it is away")
        return "back"

    monkeypatch.setattr(tenacity.nap.time, "sleep", sleep)
    monkeypatch.setattr(tenacity.nap.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience, "report", lambda *_, **__: None)
    job = cast("JobContext", SimpleNamespace(check=lambda: None))
    assert patience.patiently(job, "publish", work) == "back"
    assert now[0] < 70, "it is noticed soon"


def test_a_store_that_stays_away_fails_the_job(
    settings: Settings, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.05)
    catalog = open_catalog(settings)
    when_training(monkeypatch, lambda: (tmp_path / "artifacts").rename(tmp_path / "away"))
    when_told(monkeypatch, told, lambda: None)
    job = trained(settings, catalog)
    assert (job.state, job.error_reason) == (JobState.FAILED, "STORE_UNAVAILABLE")
    assert told
    catalog.close()


def test_a_catalog_that_is_away_costs_only_reports(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    catalog = open_catalog(settings)
    report, lost = JobContext.report, []

    def away(job: JobContext, phase: str, *rest: int, **figures: float | str) -> None:
        if phase == "train":
            lost.append(rest)
            raise CatalogUnavailableError("the database does not answer")
        report(job, phase, *rest, **figures)

    monkeypatch.setattr(JobContext, "report", away)
    assert weights(settings, catalog, trained(settings, catalog), tmp_path / "fetched")
    assert lost
    catalog.close()
