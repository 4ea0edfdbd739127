"""The training jobs that come with Toile train, shortened, on a base of the tiny base's kind."""

from pathlib import Path

import pytest

from toile.cli.names import Names
from toile.cli.training_job import load_job
from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.jobs import JobState, JobStore
from toile.core.jobs.runtime import execute
from toile.core.settings import Settings
from toile.train.handler import TrainHandler
from toile.training.run import train_and_publish

JOBS = Path(__file__).parents[3] / "training-jobs"
SHORT = {
    "steps": 4,
    "warmup_steps": 1,
    "batch_size": 2,
    "sample_interval_steps": 2,
    "validation_interval_steps": 2,
    "checkpoint_interval_steps": 2,
}


@pytest.mark.usefixtures("quick_samples")
@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_job_trains(
    settings: Settings, catalog: Catalog, store: ArtifactStore, path: Path
) -> None:
    request = load_job(path).request(Names(settings.model_copy(update={"project": "p"})))
    config = getattr(request, request.WhichOneof("recipe"))
    for name, value in SHORT.items():
        assert config.HasField(name), f"{name} is left out, so the test would run long"
        setattr(config, name, value)
    row, jobs = TrainHandler(settings, catalog, store).create(request), JobStore(catalog)
    jobs.next_attempt(row.name, after=0)
    assert execute(train_and_publish, settings, row.name, 1) == 0
    ended = jobs.get(row.name)
    assert (ended.state, ended.error_message) == (JobState.SUCCEEDED, "")
