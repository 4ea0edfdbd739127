"""What a training would take, by what an earlier one took."""

from datetime import UTC, datetime, timedelta

import pytest

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.settings import Prices, Settings
from toile.train.handler import TrainHandler
from unit.train.test_handler import request_of


def ended(catalog: Catalog, name: str, *, state: str = "SUCCEEDED", attempt: int = 1) -> None:
    """Let a job have ended, and taken something."""
    with catalog.transaction() as session:
        row = session.get_one(JobRow, name)
        row.state, row.attempt = state, attempt
        row.start_time = datetime(2026, 1, 1, tzinfo=UTC)
        row.end_time = row.start_time + timedelta(minutes=10)
        row.cpu_seconds, row.gpu_seconds = 60.0, 600.0


def test_nothing_is_known_without_a_training_that_ended_well(
    handler: TrainHandler, catalog: Catalog
) -> None:
    assert handler.estimate(request_of()) is None
    ended(catalog, handler.create(request_of(steps=100)).name, state="FAILED")
    assert handler.estimate(request_of()) is None


def test_what_one_took_is_scaled_by_the_images_to_see(
    handler: TrainHandler, catalog: Catalog
) -> None:
    earlier = handler.create(request_of(steps=100, batch_size=8)).name
    ended(catalog, earlier)
    found = handler.estimate(request_of(steps=400, batch_size=4))
    assert found is not None
    assert (found.job, found.seconds) == (earlier, 1200.0)
    assert (found.usage.cpu_seconds, found.usage.gpu_seconds) == (120.0, 1200.0)
    with catalog.reading() as session:
        assert session.query(JobRow).count() == 1, "an estimate starts nothing"
    of_class = handler.estimate(
        request_of(steps=400, batch_size=4, class_prompt="a dress", class_image_count=9)
    )
    assert of_class is not None
    assert of_class.seconds == 2400.0, "as many images of the class again"


def test_other_projects_and_interrupted_trainings_say_nothing(
    handler: TrainHandler, catalog: Catalog
) -> None:
    name = handler.create(request_of()).name
    ended(catalog, name, attempt=2)
    assert handler.estimate(request_of()) is None
    ended(catalog, name)
    assert handler.estimate(request_of()) is not None
    with catalog.transaction() as session:
        session.get_one(JobRow, name).project = "another"
    assert handler.estimate(request_of()) is None


def test_another_recipe_says_nothing(handler: TrainHandler, catalog: Catalog) -> None:
    ended(catalog, handler.create(request_of()).name)
    request = request_of()
    request.controlnet.steps = 10
    assert handler.estimate(request) is None


def test_mistakes_are_those_of_a_training(handler: TrainHandler) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        handler.estimate(request_of(rank=1000))
    assert caught.value.metadata["field"] == "lora.rank"


def test_a_budget_is_kept_with_the_job(
    settings: Settings, catalog: Catalog, store: ArtifactStore, handler: TrainHandler
) -> None:
    request = request_of()
    request.budget = 5.0
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(request)
    assert caught.value.reason == "NO_PRICES"
    priced = settings.model_copy(update={"prices": Prices(gpu_hour=3.0)})
    assert TrainHandler(priced, catalog, store).create(request).budget == 5.0
