"""What keeps a version, and what is gone with it."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from servers.inference import FakeModels, running_models
from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    GenerationAdapterRow,
    GenerationRow,
    ImageRow,
    ModelVersionRow,
    RefinementRow,
    RequestRow,
)
from toile.core.errors import ComputeUnavailableError, FailedPreconditionError, NotFoundError
from toile.core.jobs import JobState, JobStore
from toile.core.settings import Settings
from toile.train.handler import TrainHandler
from toile.v1 import train_pb2
from toile.v1.train_pb2_grpc import TrainServiceStub

MODEL = "projects/p/models/lace"
GENERATION = "projects/p/generations/g"
REFINEMENT = "projects/p/refinements/r"

Publish = Callable[..., str]


def delete(train: TrainServiceStub, name: str) -> None:
    train.DeleteModelVersion(train_pb2.DeleteModelVersionRequest(name=name))


def kept(train: TrainServiceStub, name: str) -> dict[str, str]:
    """Ask for a version or a model to be deleted; return what keeps it."""
    request = train_pb2.DeleteModelRequest(name=name)
    with pytest.raises(FailedPreconditionError) as caught:
        delete(train, name) if "/versions/" in name else train.DeleteModel(request)
    assert caught.value.reason == "MODEL_IN_USE"
    found = dict(caught.value.metadata)
    assert found.pop("name") == name
    return {use: count for use, count in found.items() if use != "request_id"}


def draw(catalog: Catalog, version: str, *, state: str = "SUCCEEDED", images: int = 0) -> None:
    """Record a generation with a version, and the request that asked for it."""
    with catalog.transaction() as session:
        session.add(
            GenerationRow(name=GENERATION, project="p", request={}, base="bases/tiny", state=state)
        )
        session.add(GenerationAdapterRow(producer=GENERATION, model_version=version, weight=1.0))
        session.add(
            RequestRow(
                scope="Generate projects/p", request_id="one", digest="d", resource=GENERATION
            )
        )
        for index in range(images):
            session.add(image(f"projects/p/images/{index}", GENERATION))


def image(name: str, producer: str) -> ImageRow:
    return ImageRow(
        name=name,
        project="p",
        origin="GENERATED",
        producer=producer,
        artifact=name,
        digest="d",
        size_bytes=1,
        media_type="image/png",
        width=8,
        height=8,
    )


@pytest.fixture
def served_models(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[FakeModels, str]]:
    """Models and their address."""
    running = running_models()
    yield asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result(60)
    asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result(60)


@pytest.fixture
def settings(settings: Settings, served_models: tuple[FakeModels, str]) -> Settings:
    return settings.model_copy(update={"inference_address": served_models[1]})


@pytest.fixture
def models(served_models: tuple[FakeModels, str]) -> FakeModels:
    return served_models[0]


def test_the_models_forget_what_is_deleted_and_nothing_else(
    models: FakeModels, train: TrainServiceStub, publish_version: Publish
) -> None:
    first, second = publish_version(), publish_version()
    train.SetModelAlias(train_pb2.SetModelAliasRequest(name=f"{MODEL}@production", version=second))
    delete(train, first)
    kept(train, second)
    assert models.forgotten == [f"{first}/made"]


def test_models_that_are_away_keep_no_version(
    models: FakeModels, train: TrainServiceStub, publish_version: Publish
) -> None:
    models.errors["ForgetAdapter"] = ComputeUnavailableError("Triton does not answer")
    version = publish_version()
    delete(train, version)
    with pytest.raises(NotFoundError):
        delete(train, version)


def test_rows_and_files_go_and_others_stay(
    train: TrainServiceStub, publish_version: Publish, catalog: Catalog, store: ArtifactStore
) -> None:
    one, two = publish_version(), publish_version()
    delete(train, one)
    with pytest.raises(NotFoundError):
        delete(train, one)
    with catalog.reading() as session:
        assert [row.name for row in session.query(ModelVersionRow)] == [two]
    keys = {info.key for info in store.list(f"{MODEL}/")}
    assert keys
    assert all(key.startswith(f"{two}/") for key in keys)


def test_images_keep_the_version_that_drew_them(
    train: TrainServiceStub, publish_version: Publish, catalog: Catalog
) -> None:
    name, other = publish_version(), publish_version()
    draw(catalog, name, images=3)
    assert kept(train, name) == {"images": "3"}
    delete(train, other)
    with catalog.transaction() as session:
        session.query(ImageRow).delete()
    delete(train, name)


def test_a_refined_image_keeps_the_version(
    train: TrainServiceStub, publish_version: Publish, catalog: Catalog
) -> None:
    name = publish_version()
    with catalog.transaction() as session:
        session.add(image("projects/p/images/source", ""))
        session.add(image("projects/p/images/refined", REFINEMENT))
        session.add(GenerationAdapterRow(producer=REFINEMENT, model_version=name, weight=1.0))
        session.flush()
        session.add(
            RefinementRow(
                name=REFINEMENT,
                project="p",
                source_image="projects/p/images/source",
                image="projects/p/images/refined",
                base="bases/tiny",
                instruction="red",
                plan={},
            )
        )
    assert kept(train, name) == {"images": "1"}


def test_a_running_generation_keeps_the_version(
    train: TrainServiceStub, publish_version: Publish, catalog: Catalog
) -> None:
    name = publish_version()
    draw(catalog, name, state="RUNNING")
    assert kept(train, name) == {"running_generations": "1"}


def test_a_failed_generation_does_not_go_on_without_its_adapter(
    train: TrainServiceStub, publish_version: Publish, catalog: Catalog
) -> None:
    name = publish_version()
    draw(catalog, name, state="FAILED")
    delete(train, name)
    with catalog.reading() as session:
        assert session.get(GenerationRow, GENERATION) is not None
        assert session.query(RequestRow).count() == 0  # asked for again, it finds no adapter


def test_aliases_keep_the_version(train: TrainServiceStub, publish_version: Publish) -> None:
    name = publish_version()
    for alias in ("production", "staging"):
        request = train_pb2.SetModelAliasRequest(name=f"{MODEL}@{alias}", version=name)
        train.SetModelAlias(request)
    assert kept(train, name) == {"aliases": "2"}


def test_a_job_keeps_what_it_makes(
    train: TrainServiceStub, handler: TrainHandler, catalog: Catalog
) -> None:
    request = train_pb2.CreateTrainingJobRequest(
        parent="projects/p",
        model_id="lace",
        dataset="projects/p/datasets/lace",
        lora=train_pb2.LoraConfig(),
    )
    job = handler.create(request)
    assert kept(train, job.target) == {"jobs": "1"}
    assert kept(train, MODEL) == {"jobs": "1"}
    JobStore(catalog).finish(job.name, JobState.FAILED, reason="OUT_OF_MEMORY")
    with pytest.raises(NotFoundError):
        delete(train, job.target)
    train.DeleteModel(train_pb2.DeleteModelRequest(name=MODEL))


def test_the_number_of_a_deleted_version_is_not_used_again(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    publish_version()
    delete(train, publish_version())
    assert publish_version() == f"{MODEL}/versions/3"


def test_a_model_is_deleted_once_it_is_empty(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    name = publish_version()
    assert kept(train, MODEL) == {"versions": "1"}
    delete(train, name)
    train.DeleteModel(train_pb2.DeleteModelRequest(name=MODEL))
    with pytest.raises(NotFoundError):
        train.DeleteModel(train_pb2.DeleteModelRequest(name=MODEL))
