"""What Weights & Biases is told of a training, and that a training does not mind it."""

import json
import logging
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow, ModelVersionRow
from toile.core.errors import CancelledError
from toile.core.jobs.runtime import JobContext
from toile.core.settings import Settings, WandbSettings
from toile.training import tracking
from toile.training.config import LoraRecipeConfig
from toile.training.events import figures
from toile.training.loop import StepReport
from toile.training.run import train_and_publish

CONFIG = LoraRecipeConfig(rank=4, sample_prompts=("a dress",))
Train = Callable[..., JobRow]


def report(step: int, validation: float | None = None) -> StepReport:
    return StepReport(step, 9, 0.0, 1.0 / step, 0.001 * step, 8.0, 1.0, validation)


def job_of(settings: Settings, **wandb: str) -> JobContext:
    """A job of the kind that trains, as far as W&B is told of it."""
    told = WandbSettings(**{"project": "lace", "mode": "offline", **wandb})  # type: ignore[arg-type]
    return SimpleNamespace(  # type: ignore[return-value]
        settings=settings.model_copy(update={"wandb": told}),
        name="projects/p/jobs/j-1",
        target="projects/p/models/lace/versions/3",
        spec={"base": "bases/tiny", "dataset_version": "projects/p/datasets/lace/versions/1"},
    )


@pytest.fixture
def plain(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


class Recorded:
    """A W&B in this process: what runs were made with, and what they were told."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.exit_codes: list[int] = []
        self.fails_at = 0
        self.released = threading.Event()
        self.released.set()

    def Settings(self, **options: object) -> object:  # noqa: N802 - W&B's name
        return options

    def init(self, **arguments: Any) -> "Recorded":
        self.released.wait(30)
        self.runs.append(arguments)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, told: dict[str, float]) -> None:
        if told["step"] == self.fails_at:
            raise OSError("the network is away")
        self.logged.append(told)

    def finish(self, *, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", recorded)
    return recorded


def test_without_a_project_nobody_is_told(plain: Settings, wandb: Recorded) -> None:
    with tracking.tracking(job_of(plain, project=""), CONFIG) as told:
        told(report(1))
    assert not wandb.runs


def test_each_step_and_the_configuration_are_told(plain: Settings, wandb: Recorded) -> None:
    reports = [report(1), report(2, validation=0.5)]
    with tracking.tracking(job_of(plain, entity="studio"), CONFIG) as told:
        for each in reports:
            told(each)
    assert wandb.logged == [{"step": each.step, **figures(each)} for each in reports]
    assert wandb.logged[1]["validation_loss"] == 0.5
    (made,) = wandb.runs
    assert (made["project"], made["entity"], made["mode"]) == ("lace", "studio", "offline")
    assert (made["id"], made["resume"]) == ("j-1", "allow"), "the next attempt goes on with it"
    assert made["dir"] == str(plain.home_path)
    assert made["config"]["rank"] == 4
    assert made["config"]["dataset_version"] == "projects/p/datasets/lace/versions/1"
    assert wandb.exit_codes == [0]


@pytest.mark.parametrize(
    ("error", "exit_code"), [(CancelledError("paused"), 0), (RuntimeError("no memory"), 1)]
)
def test_how_a_training_ends_is_told(
    plain: Settings, wandb: Recorded, error: Exception, exit_code: int
) -> None:
    with pytest.raises(type(error)), tracking.tracking(job_of(plain), CONFIG):
        raise error
    assert wandb.exit_codes == [exit_code]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_goes_wrong_is_logged_once_and_the_training_goes_on(
    plain: Settings, wandb: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fails_at = 2
    with tracking.tracking(job_of(plain), CONFIG) as told:
        for step in range(1, 6):
            told(report(step))
    assert [each["step"] for each in wandb.logged] == [1]
    assert warnings_of(caplog) == ["W&B is not told of the training: OSError: the network is away"]


@pytest.mark.usefixtures("quick_samples")
def test_a_training_tells_what_its_version_records(
    train: Train, catalog: Catalog, wandb: Recorded
) -> None:
    def work(job: JobContext) -> None:
        told = WandbSettings(project="lace")
        job.settings = job.settings.model_copy(update={"wandb": told})
        train_and_publish(job)

    row = train(work, validation_share=0.25, validation_interval_steps=3)
    assert (row.state, row.error_message) == ("SUCCEEDED", "")
    assert wandb.runs[0]["config"]["model_version"] == row.target
    with catalog.reading() as session:
        version = session.get_one(ModelVersionRow, row.target)
    assert [each["step"] for each in wandb.logged] == [1, 2, 3, 4]
    mean = sum(each["loss"] for each in wandb.logged) / 4
    assert version.final_loss == pytest.approx(mean)
    assert ["validation_loss" in each for each in wandb.logged] == [False, False, True, True]


def test_without_the_package_the_log_says_what_to_install(
    plain: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with tracking.tracking(job_of(plain), CONFIG) as told:
        told(report(1))
    (message,) = warnings_of(caplog)
    assert "pip install 'toile[wandb]'" in message


def test_a_training_waits_for_nobody(
    plain: Settings,
    wandb: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.05)
    wandb.released.clear()  # nothing comes back from where runs are made
    with tracking.tracking(job_of(plain), CONFIG) as told:
        told(report(1))
        assert not wandb.logged
    assert "does not wait" in warnings_of(caplog)[0]
    wandb.released.set()


def test_w_and_b_itself_keeps_both_attempts_of_a_run_offline(
    plain: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    for steps in ((1, 2, 3), (3, 4)):  # the third is done again
        with tracking.tracking(job_of(plain), CONFIG) as told:
            for step in steps:
                told(report(step))
        time.sleep(1.1)  # W&B names folders by the second
    assert not warnings_of(caplog)
    folders = sorted((plain.home_path / "wandb").glob("offline-run-*-j-1"))
    (first, one), (second, two) = (kept_of(*each) for each in zip(folders, (3, 2), strict=True))
    assert first["rank"] == second["rank"] == 4
    assert [each["step"] for each in one] == [1, 2, 3]
    assert [each["step"] for each in two] == [3, 4]
    assert {name: one[2][name] for name in figures(report(3))} == figures(report(3))


def kept_of(folder: Path, steps: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Configuration and history in the file of a run, once it has so many steps.

    The process that writes it may be a moment behind the run's end.
    """
    deadline = time.monotonic() + 20
    while len((found := read(folder))[1]) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    config: dict[str, Any] = {}
    history: list[dict[str, float]] = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.run.config.update:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        if items := record.history.item:
            history.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return config, history


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B, which has LevelDB's log format after a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block_bytes, header_bytes, whole, last = 1 << 15, 7, 1, 4
    at, parts = header_bytes, b""
    while at + header_bytes <= len(data):
        left = block_bytes - at % block_bytes
        if left < header_bytes:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + header_bytes : at + header_bytes + length]
        at += header_bytes + length
        if kind in (whole, last):
            yield parts
            parts = b""
