"""What is said of models and versions, aliases and deprecation, over gRPC."""

from collections.abc import Callable

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import ModelAliasRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from toile.core.jobs import JobState, JobStore
from toile.core.jobs.costs import Usage
from toile.core.settings import Prices, Settings
from toile.train.handler import TrainHandler
from toile.v1 import train_pb2
from toile.v1.train_pb2_grpc import TrainServiceStub

MODEL = "projects/p/models/lace"
PRODUCTION = f"{MODEL}@production"
LACE = "projects/p/datasets/lace"

PRICES = Prices(cpu_hour=0.5, gpu_hour=12.0, currency="EUR")

Publish = Callable[..., str]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"prices": PRICES})


def model(train: TrainServiceStub, name: str = MODEL) -> train_pb2.Model:
    return train.GetModel(train_pb2.GetModelRequest(name=name)).model


def version(train: TrainServiceStub, name: str) -> train_pb2.ModelVersion:
    return train.GetModelVersion(train_pb2.GetModelVersionRequest(name=name)).version


def set_alias(train: TrainServiceStub, name: str, to: str) -> train_pb2.ModelAlias:
    return train.SetModelAlias(train_pb2.SetModelAliasRequest(name=name, version=to)).alias


def deprecate(train: TrainServiceStub, name: str, reason: str) -> train_pb2.ModelVersion:
    request = train_pb2.DeprecateModelVersionRequest(name=name, reason=reason)
    return train.DeprecateModelVersion(request).version


def test_models_appear_with_their_first_version(
    train: TrainServiceStub, handler: TrainHandler, publish_version: Publish
) -> None:
    handler.create(
        train_pb2.CreateTrainingJobRequest(
            parent="projects/p", model_id="pending", dataset=LACE, lora=train_pb2.LoraConfig()
        )
    )
    with pytest.raises(NotFoundError):
        model(train, "projects/p/models/pending")
    publish_version()
    newest = publish_version()
    assert model(train).latest_version == newest
    listed = train.ListModels(train_pb2.ListModelsRequest(parent="projects/p"))
    assert [one.name for one in listed.models] == [MODEL]
    assert not listed.next_page_token


def test_models_cost_what_all_their_trainings_took(
    train: TrainServiceStub, handler: TrainHandler, catalog: Catalog, publish_version: Publish
) -> None:
    jobs = JobStore(catalog)

    def fail(model: str, usage: Usage) -> None:
        request = train_pb2.CreateTrainingJobRequest(
            parent="projects/p", model_id=model, dataset=LACE, lora=train_pb2.LoraConfig()
        )
        job = handler.create(request)
        jobs.next_attempt(job.name, after=0)
        jobs.start(job.name, 1)
        jobs.heartbeat(job.name, 1, usage, PRICES)
        jobs.finish(job.name, JobState.FAILED, attempt=1, reason="INTERNAL", message="x")

    for name in ("lace", "lace-2", "silk"):
        publish_version(name)
    fail("lace", Usage(cpu_seconds=7200, gpu_seconds=0))
    fail("lace", Usage(cpu_seconds=0, gpu_seconds=1800))
    fail("lace-2", Usage(cpu_seconds=3600, gpu_seconds=0))
    listed = train.ListModels(train_pb2.ListModelsRequest(parent="projects/p")).models
    costs = {one.name.rpartition("/")[2]: one.cost for one in listed}
    assert model(train).cost == costs["lace"]
    took = {name: (cost.cpu_seconds, cost.gpu_seconds) for name, cost in costs.items()}
    assert took == {"lace": (7200, 1800), "lace-2": (3600, 0), "silk": (0, 0)}
    assert costs["lace"].amount == pytest.approx(7.0)
    assert costs["lace"].currency == "EUR"


def test_versions_are_listed_newest_first(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    names = [publish_version() for _ in range(3)]
    request = train_pb2.ListModelVersionsRequest(parent=MODEL, page_size=2)
    first = train.ListModelVersions(request)
    request.page_token = first.next_page_token
    rest = train.ListModelVersions(request)
    assert [one.name for one in (*first.versions, *rest.versions)] == names[::-1]
    assert not rest.next_page_token


def test_version_tells_its_lineage_and_whole_configuration(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    found = version(train, publish_version())
    assert found.dataset_version == f"{LACE}/versions/2"
    assert found.config.HasField("seed")
    assert list(found.config.sample_prompts) == ["<lace> white dress", "<lace> black skirt"]
    assert found.files[0].path == "a/b.bin"
    assert not found.imported_digest


def test_a_controlnet_is_a_version_like_any_other(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    lora, control = publish_version(), publish_version(recipe="controlnet")
    found = version(train, control)
    assert found.adapter_type == "controlnet"
    assert found.controlnet_config.control_kind == "edges"
    assert found.controlnet_config.caption_dropout == 0.5
    assert not found.HasField("config")
    listed = train.ListModelVersions(train_pb2.ListModelVersionsRequest(parent=MODEL)).versions
    assert [(one.name, one.adapter_type) for one in listed] == [
        (control, "controlnet"),
        (lora, "lora"),
    ]
    assert not listed[1].HasField("controlnet_config")
    set_alias(train, PRODUCTION, control)
    assert version(train, PRODUCTION).name == control
    train.DeleteModelAlias(train_pb2.DeleteModelAliasRequest(name=PRODUCTION))
    train.DeleteModelVersion(train_pb2.DeleteModelVersionRequest(name=control))
    with pytest.raises(NotFoundError):
        version(train, control)


def test_files_are_read_in_pieces(train: TrainServiceStub, publish_version: Publish) -> None:
    def read(name: str, path: str) -> list[int]:
        request = train_pb2.DownloadModelFileRequest(name=name, path=path)
        return [len(answer.chunk) for answer in train.DownloadModelFile(request)]

    name = publish_version()
    assert read(name, "a/b.bin") == [1 << 20] * 3
    with pytest.raises(NotFoundError):
        read(name, "../../../secret")
    with pytest.raises(NotFoundError):
        read(f"{MODEL}/versions/9", "a/b.bin")


def test_an_alias_is_moved_from_version_to_version(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    one, two = publish_version(), publish_version()
    assert set_alias(train, PRODUCTION, one).version == one
    assert version(train, PRODUCTION).name == one
    assert list(version(train, one).aliases) == [PRODUCTION]

    moved = set_alias(train, PRODUCTION, two)

    assert version(train, PRODUCTION).name == two
    assert not version(train, one).aliases
    assert list(model(train).aliases) == [moved]
    assert moved.update_time.ToMilliseconds() > 0


def test_an_alias_is_of_its_own_model(train: TrainServiceStub, publish_version: Publish) -> None:
    publish_version()
    silk = publish_version("silk")
    with pytest.raises(InvalidArgumentError) as caught:
        set_alias(train, PRODUCTION, silk)
    assert caught.value.metadata["field"] == "version"
    for name in (f"{MODEL}@", f"{MODEL}@Production", f"{MODEL}/versions/1@a", MODEL):
        with pytest.raises(InvalidArgumentError):
            set_alias(train, name, f"{MODEL}/versions/1")
    for name, to in ((PRODUCTION, f"{MODEL}/versions/9"), ("projects/p/models/x@a", "")):
        with pytest.raises(NotFoundError):
            set_alias(train, name, to or "projects/p/models/x/versions/1")
    assert not model(train).aliases


def test_an_alias_is_removed(
    train: TrainServiceStub, publish_version: Publish, catalog: Catalog
) -> None:
    set_alias(train, PRODUCTION, publish_version())
    train.DeleteModelAlias(train_pb2.DeleteModelAliasRequest(name=PRODUCTION))
    with pytest.raises(NotFoundError):
        version(train, PRODUCTION)
    with pytest.raises(NotFoundError):
        train.DeleteModelAlias(train_pb2.DeleteModelAliasRequest(name=PRODUCTION))
    with catalog.reading() as session:
        assert session.query(ModelAliasRow).count() == 0


def test_a_deprecated_version_is_never_the_newest(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    one, two = publish_version(), publish_version()
    set_alias(train, PRODUCTION, two)

    first = deprecate(train, two, " drew seams ")
    again = deprecate(train, two, "draws seams")

    assert (first.deprecation_reason, again.deprecation_reason) == ("drew seams", "draws seams")
    assert first.deprecate_time == again.deprecate_time
    assert model(train).latest_version == one
    assert version(train, two).name == version(train, PRODUCTION).name == two
    listed = train.ListModelVersions(train_pb2.ListModelVersionsRequest(parent=MODEL)).versions
    assert [v.HasField("deprecate_time") for v in listed] == [True, False]

    deprecate(train, one, "old")
    assert model(train).latest_version == ""
    assert publish_version().endswith("/3")


def test_deprecating_needs_a_reason_and_a_version(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    name = publish_version()
    for reason in ("", "  ", "x" * 501):
        with pytest.raises(InvalidArgumentError) as caught:
            deprecate(train, name, reason)
        assert caught.value.metadata["field"] == "reason"
    with pytest.raises(NotFoundError):
        deprecate(train, f"{MODEL}/versions/9", "old")
    assert not version(train, name).HasField("deprecate_time")


def test_nothing_is_promoted_to_a_deprecated_version(
    train: TrainServiceStub, publish_version: Publish
) -> None:
    name = publish_version()
    deprecate(train, name, "draws seams")
    with pytest.raises(FailedPreconditionError) as caught:
        set_alias(train, PRODUCTION, name)
    assert caught.value.reason == "VERSION_DEPRECATED"
