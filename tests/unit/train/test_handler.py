"""What is asked of a training before it is queued."""

import importlib.util
from pathlib import Path

import pytest
from sqlalchemy import select, update

from toile.core.artifacts import ArtifactStore, publish
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    JobRow,
)
from toile.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RequestReusedError,
)
from toile.core.jobs import JobState, JobStore
from toile.core.settings import EngineSettings, Settings
from toile.train.handler import TrainHandler
from toile.training.checks import hold_out
from toile.v1 import train_pb2

LACE = "projects/p/datasets/lace"
Files = dict[str, bytes | Path]
LONG_WORD = "qxz" * 60
NINE_CHUNKS = " BREAK ".join(["lace"] * 9)


def request_of(
    *,
    dataset: str = LACE,
    model: str = "lace",
    base: str = "",
    request_id: str = "",
    **lora: object,
) -> train_pb2.CreateTrainingJobRequest:
    return train_pb2.CreateTrainingJobRequest(
        parent="projects/p",
        model_id=model,
        dataset=dataset,
        base=base,
        lora=train_pb2.LoraConfig(**lora),  # type: ignore[arg-type]
        request_id=request_id,
    )


def test_newest_version_and_defaults_are_filled_in(handler: TrainHandler) -> None:
    job = handler.create(request_of(rank=8))
    assert job.target == "projects/p/models/lace/versions/1"
    assert job.spec["dataset_version"] == f"{LACE}/versions/2"
    assert job.spec["base"] == "bases/tiny"
    config = job.spec["config"]
    assert (config["rank"], config["alpha"]) == (8, 8.0)
    assert config["steps"] > 0
    assert config["sample_prompts"] == ["<lace> white dress", "<lace> black skirt"]


def test_brackets_in_a_caption_are_no_emphasis_in_its_sample(
    handler: TrainHandler, catalog: Catalog
) -> None:
    with catalog.transaction() as session:
        session.execute(update(DatasetItemRow).values(caption="<lace> dress (no. 3:40)"))
    job = handler.create(request_of())
    assert job.spec["config"]["sample_prompts"] == [r"<lace> dress \(no. 3:40\)"]


def test_named_version_is_taken(handler: TrainHandler) -> None:
    job = handler.create(request_of(dataset=f"{LACE}/versions/1"))
    assert job.spec["dataset_version"] == f"{LACE}/versions/1"


def test_zero_is_a_value_and_not_a_default(handler: TrainHandler) -> None:
    job = handler.create(request_of(caption_dropout=0.0, min_snr_gamma=0.0))
    assert job.spec["config"]["caption_dropout"] == 0.0
    assert job.spec["config"]["min_snr_gamma"] == 0.0


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (request_of(rank=65), "lora.rank"),
        (request_of(steps=0), "lora.steps"),
        (request_of(sample_prompts=["a", "x" * 2001]), "lora.sample_prompts.1"),
        (request_of(sample_prompts=["a", "b", "(red:99)"]), "lora.sample_prompts.2"),
        (request_of(sample_prompts=["a", NINE_CHUNKS]), "lora.sample_prompts.1"),
        (request_of(class_prompt="a dress"), "lora.class_image_count"),
        (request_of(class_prompt=LONG_WORD, class_image_count=9), "lora.class_prompt"),
        (request_of(class_prompt="x" * 2001, class_image_count=9), "lora.class_prompt"),
        (request_of(model="Lace!"), "model_id"),
        (request_of(dataset="lace"), "dataset"),
        (request_of(dataset="projects/other/datasets/lace"), "dataset"),
        (request_of(base="tiny"), "base"),
    ],
)
def test_mistakes_are_named_and_nothing_is_queued(
    handler: TrainHandler,
    catalog: Catalog,
    request_: train_pb2.CreateTrainingJobRequest,
    field: str,
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        handler.create(request_)
    assert caught.value.metadata["field"] == field
    with catalog.reading() as session:
        assert session.query(JobRow).count() == 0


def test_recipe_is_needed(handler: TrainHandler) -> None:
    request = request_of()
    request.ClearField("lora")
    with pytest.raises(InvalidArgumentError) as caught:
        handler.create(request)
    assert caught.value.metadata["field"] == "recipe"


def test_unbuilt_dataset(handler: TrainHandler) -> None:
    for name in ("projects/p/datasets/unbuilt", f"{LACE}/versions/9"):
        with pytest.raises(FailedPreconditionError) as caught:
            handler.create(request_of(dataset=name))
        assert caught.value.reason == "DATASET_NOT_BUILT"


def test_a_dataset_from_which_nothing_can_be_held_out(
    handler: TrainHandler, catalog: Catalog
) -> None:
    with catalog.transaction() as session:
        for version in session.query(DatasetVersionRow):
            version.image_count = 1
    assert handler.create(request_of(validation_share=0.0))
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(request_of(validation_share=0.2))
    assert caught.value.reason == "DATASET_TOO_SMALL"
    assert caught.value.metadata["field"] == "lora.validation_share"


def test_repeats_are_of_images_that_there_are(handler: TrainHandler, catalog: Catalog) -> None:
    job = handler.create(request_of(repeats={"a.*": 3}))
    assert job.spec["config"]["repeats"] == {"a.*": 3}
    for repeats, reason in (
        ({"b.*": 3}, "REPEATS_MATCH_NOTHING"),
        ({"a.*": 3, "*.jpg": 2}, "REPEATS_OVERLAP"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            handler.create(request_of(repeats=repeats))
        assert caught.value.reason == reason
        assert caught.value.metadata["field"].startswith("lora.repeats.")
    with catalog.reading() as session:
        assert session.query(JobRow).count() == 1


def test_a_masked_loss_needs_masks(handler: TrainHandler, store: ArtifactStore) -> None:
    publish(store, f"{LACE}/versions/1/made", {"images/0001.png": b"0"})
    publish(store, f"{LACE}/versions/2/made", {"masks/0001.png": b"0"})
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(request_of(dataset=f"{LACE}/versions/1", masked_loss=True))
    assert caught.value.reason == "DATASET_LACKS_MASKS"
    assert caught.value.metadata["field"] == "lora.masked_loss"
    job = handler.create(request_of(masked_loss=True, background_weight=0.5))
    assert job.spec["config"]["background_weight"] == 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_encoder_2/config.json": None}, "no text_encoder_2"),
        ({"unet/config.json": b'{"_class_name": "UNet2DConditionModel"}'}, "addition_embed_type"),
        ({"unet/config.json": b'{"_class_name": "FluxTransformer2DModel"}'}, "_class_name"),
        ({"unet/config.json": b"{"}, "no configuration"),
    ],
)
def test_a_base_of_another_architecture_is_not_trained_on(
    handler: TrainHandler,
    catalog: Catalog,
    store: ArtifactStore,
    base_files: Files,
    changes: dict[str, bytes | None],
    says: str,
) -> None:
    files = {name: data for name, data in {**base_files, **changes}.items() if data is not None}
    publish(store, "bases/tiny/1", files)
    with catalog.transaction() as session:
        session.execute(update(BaseRow).values(artifact="bases/tiny/1"))
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        handler.create(request_of())
    assert caught.value.reason == "BAD_BASE"
    assert caught.value.metadata["field"] == "base"


def test_images_are_not_enlarged(handler: TrainHandler, catalog: Catalog) -> None:
    def resolve(resolution: int) -> None:
        with catalog.transaction() as session:
            session.execute(update(DatasetVersionRow).values(resolution=resolution))

    resolve(120)
    with pytest.raises(FailedPreconditionError, match="resolution: 128") as caught:
        handler.create(request_of())
    assert caught.value.reason == "DATASET_RESOLUTION"
    assert caught.value.metadata["field"] == "dataset"
    resolve(256)
    assert handler.create(request_of())


def test_a_class_is_read_literally_and_may_not_be_for_adults(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    def ask(allowed: str, prompt: str) -> JobRow:
        changed = settings.model_copy(update={"restricted_content": allowed})
        request = request_of(class_prompt=prompt, class_image_count=5)
        return TrainHandler(changed, catalog, store).create(request)

    job = ask("refuse", "a dress (red:99)")
    assert job.spec["config"]["class_prompt"] == "a dress (red:99)"
    with pytest.raises(FailedPreconditionError) as caught:
        ask("refuse", "a nude woman")
    assert caught.value.reason == "RESTRICTED_CONTENT"
    assert caught.value.metadata["field"] == "lora.class_prompt"
    assert ask("allow", "a nude woman")


def test_samples_may_not_be_for_adults(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    def ask(allowed: str, **config: object) -> JobRow:
        changed = settings.model_copy(update={"restricted_content": allowed})
        return TrainHandler(changed, catalog, store).create(request_of(**config))

    prompts = ["a dress", "a nude woman"]
    with pytest.raises(FailedPreconditionError) as caught:
        ask("refuse", sample_prompts=prompts)
    assert caught.value.reason == "RESTRICTED_CONTENT"
    assert caught.value.metadata["field"] == "lora.sample_prompts.1"
    assert ask("allow", sample_prompts=prompts).spec["config"]["sample_prompts"] == prompts

    with catalog.transaction() as session:
        white = DatasetItemRow.caption == "<lace> white dress"
        session.execute(update(DatasetItemRow).where(white).values(caption="<lace> nude woman"))
    assert ask("refuse").spec["config"]["sample_prompts"] == [
        "<lace> black skirt",
        "<lace> red hat",
    ]
    assert ask("allow").spec["config"]["sample_prompts"][0] == "<lace> nude woman"
    with catalog.transaction() as session:
        session.execute(update(DatasetVersionRow).values(trigger_word="<topless>"))
        session.execute(update(DatasetItemRow).values(caption="<topless> dress"))
    with pytest.raises(FailedPreconditionError) as caught:
        ask("refuse")
    assert caught.value.reason == "RESTRICTED_CONTENT"


@pytest.mark.parametrize("caption", ["<lace> nude woman", NINE_CHUNKS.replace("BREAK", LONG_WORD)])
def test_what_cannot_be_drawn_under_a_map_is_drawn_by_the_trigger_word(
    handler: TrainHandler, catalog: Catalog, caption: str
) -> None:
    with catalog.transaction() as session:
        first = DatasetItemRow.file_name == "000000.png"
        session.execute(update(DatasetItemRow).where(first).values(caption=caption))
    job = handler.create(control_request_of())
    assert job.spec["config"]["sample_prompts"] == ["<lace>", "<lace> white dress"]


@pytest.mark.parametrize(
    ("said", "reason", "setting"),
    [
        ({"content_rating": "RESTRICTED"}, "RESTRICTED_CONTENT", "restricted_content"),
        ({"people_consent": "NOT_CONSENTED"}, "PEOPLE_WITHOUT_CONSENT", "people_without_consent"),
    ],
)
@pytest.mark.parametrize("row", [DatasetRow, DatasetVersionRow])
def test_photographs_that_policy_forbids_are_not_trained_on(
    settings: Settings,
    catalog: Catalog,
    store: ArtifactStore,
    said: dict[str, str],
    reason: str,
    setting: str,
    row: type[DatasetRow] | type[DatasetVersionRow],
) -> None:
    with catalog.transaction() as session:
        session.execute(update(row).values(**said))
    for create in (request_of(), control_request_of()):
        with pytest.raises(FailedPreconditionError, match=f"TOILE_{setting.upper()}") as caught:
            TrainHandler(settings, catalog, store).create(create)
        assert caught.value.reason == reason
        assert caught.value.metadata["field"] == "dataset"
    allowing = settings.model_copy(update={setting: "allow"})
    assert TrainHandler(allowing, catalog, store).create(request_of())


@pytest.mark.parametrize("consent", ["UNSPECIFIED", "NO_PEOPLE", "CONSENTED"])
def test_photographs_of_which_nothing_bad_is_said_are(
    handler: TrainHandler, catalog: Catalog, consent: str
) -> None:
    with catalog.transaction() as session:
        session.execute(update(DatasetVersionRow).values(people_consent=consent))
        session.execute(update(DatasetRow).values(content_rating="GENERAL"))
    assert handler.create(request_of())


def test_a_lora_of_whole_transformers_wants_an_engine_that_takes_it(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    request = request_of(target_modules="transformer")
    with pytest.raises(FailedPreconditionError, match="TOILE_ENGINE__TARGETS=") as caught:
        TrainHandler(settings, catalog, store).create(request)
    assert caught.value.reason == "TARGETS_NOT_SERVED"
    assert caught.value.metadata["field"] == "lora.target_modules"
    wide = settings.model_copy(update={"engine": EngineSettings(targets="transformer")})
    for targets in ("attention", "transformer"):
        job = TrainHandler(wide, catalog, store).create(request_of(target_modules=targets))
        assert job.spec["config"]["target_modules"] == targets
    dora = request_of(target_modules="transformer", use_dora=True)  # which no engine draws
    assert TrainHandler(settings, catalog, store).create(dora).spec["config"]["use_dora"]


@pytest.mark.parametrize(
    ("installed", "refused"),
    [
        ({"torch", "bitsandbytes"}, False),
        ({"torch"}, True),
        (set(), False),  # trainings run elsewhere, with what is there
    ],
)
def test_an_optimizer_that_is_not_installed_where_trainings_run(
    handler: TrainHandler, monkeypatch: pytest.MonkeyPatch, installed: set[str], refused: bool
) -> None:
    found = {"torch", "bitsandbytes"} - installed
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in found else object() if name in installed else find(name),
    )
    assert handler.create(request_of(optimizer="adamw"))
    if not refused:
        job = handler.create(request_of(optimizer="adamw8bit"))
        assert job.spec["config"]["optimizer"] == "adamw8bit"
        return
    with pytest.raises(FailedPreconditionError, match=r"toile\[adamw8bit\]") as caught:
        handler.create(request_of(optimizer="adamw8bit"))
    assert caught.value.reason == "OPTIMIZER_NOT_INSTALLED"
    assert caught.value.metadata["field"] == "lora.optimizer"


def test_unknown_dataset_and_base(handler: TrainHandler) -> None:
    with pytest.raises(NotFoundError):
        handler.create(request_of(dataset="projects/p/datasets/none"))
    with pytest.raises(NotFoundError):
        handler.create(request_of(base="bases/none"))


def test_a_rank_that_could_not_be_served(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    engine = settings.engine.model_copy(update={"max_rank": 16})
    handler = TrainHandler(settings.model_copy(update={"engine": engine}), catalog, store)
    assert handler.create(request_of(rank=16))
    with pytest.raises(InvalidArgumentError, match="TOILE_ENGINE__MAX_RANK") as caught:
        handler.create(request_of(rank=17))
    assert caught.value.metadata["field"] == "lora.rank"


def test_each_worker_needs_an_image(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    handler = TrainHandler(settings.model_copy(update={"train_workers": 4}), catalog, store)
    with pytest.raises(InvalidArgumentError, match="at least 4"):
        handler.create(request_of(batch_size=2))


def test_same_request_twice_is_one_job(handler: TrainHandler) -> None:
    first = handler.create(request_of(request_id="r1"))
    assert handler.create(request_of(request_id="r1")).name == first.name
    with pytest.raises(RequestReusedError):
        handler.create(request_of(request_id="r1", rank=8))


def test_trainings_under_way_hold_their_numbers(handler: TrainHandler, catalog: Catalog) -> None:
    first = handler.create(request_of())
    second = handler.create(request_of())
    other = handler.create(request_of(model="silk"))
    assert [job.target.rpartition("/")[2] for job in (first, second, other)] == ["1", "2", "1"]
    JobStore(catalog).finish(second.name, JobState.FAILED, reason="OUT_OF_MEMORY")
    assert handler.create(request_of()).target.endswith("/2")


def control_request_of(**controlnet: object) -> train_pb2.CreateTrainingJobRequest:
    request = request_of(model="lines")
    request.controlnet.CopyFrom(train_pb2.ControlNetConfig(**controlnet))  # type: ignore[arg-type]
    return request


def test_a_controlnet_s_defaults_are_its_own(handler: TrainHandler) -> None:
    job = handler.create(control_request_of(seed=3))
    assert job.spec["recipe"] == "controlnet"
    config = job.spec["config"]
    assert (config["control_kind"], config["caption_dropout"], config["seed"]) == ("edges", 0.5, 3)
    # Of the first images, for under their maps the samples are drawn.
    assert config["sample_prompts"] == ["<lace> white dress", "<lace> white dress"]


def test_an_image_without_a_caption_is_drawn_by_the_trigger_word(
    handler: TrainHandler, catalog: Catalog
) -> None:
    with catalog.transaction() as session:
        session.execute(
            update(DatasetItemRow)
            .where(DatasetItemRow.file_name == "000000.png")
            .values(caption="")
        )
    job = handler.create(control_request_of())
    assert job.spec["config"]["sample_prompts"] == ["<lace>", "<lace> white dress"]


@pytest.mark.parametrize(
    ("controlnet", "field"),
    [
        ({"control_kind": "depth"}, "controlnet.control_kind"),
        ({"steps": 0}, "controlnet.steps"),
        ({"sample_prompts": ["a", "x" * 2001]}, "controlnet.sample_prompts.1"),
        ({"sample_prompts": ["(red:99)"]}, "controlnet.sample_prompts.0"),
        ({"sample_prompts": [NINE_CHUNKS]}, "controlnet.sample_prompts.0"),
    ],
)
def test_mistakes_in_a_controlnet_are_named(
    handler: TrainHandler, controlnet: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        handler.create(control_request_of(**controlnet))
    assert caught.value.metadata["field"] == field


def test_parts_are_of_bases_that_find_them(
    handler: TrainHandler, catalog: Catalog, store: ArtifactStore, base_files: Files
) -> None:
    assert handler.create(control_request_of(control_kind="edges"))
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(control_request_of(control_kind="parts"))
    assert caught.value.reason == "BASE_LACKS_PART"
    assert caught.value.metadata["field"] == "controlnet.control_kind"
    assert caught.value.metadata["part"] == "segmenter"
    publish(store, "bases/tiny/1", {**base_files, "segmenter/config.json": b"{}"})
    with catalog.transaction() as session:
        session.execute(update(BaseRow).values(artifact="bases/tiny/1"))
    assert handler.create(control_request_of(control_kind="parts"))


def test_a_controlnet_goes_on_from_one_that_the_base_has(handler: TrainHandler) -> None:
    job = handler.create(control_request_of(initial_weights="base"))
    assert job.spec["config"]["initial_weights"] == "base"
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(control_request_of(initial_weights="base", control_kind="given"))
    assert caught.value.reason == "BASE_LACKS_PART"
    assert caught.value.metadata["field"] == "controlnet.initial_weights"
    assert caught.value.metadata["part"] == "controlnet/given"


def test_a_controlnet_s_samples_are_of_what_is_held_out_first(
    handler: TrainHandler, catalog: Catalog
) -> None:
    with catalog.transaction() as session:
        for row in session.scalars(select(DatasetItemRow)):
            row.caption = f"a dress, {row.file_name}"
        names = sorted(session.scalars(select(DatasetItemRow.file_name)))
    job = handler.create(control_request_of(validation_share=0.3, validation_interval_steps=5))
    training, held_out = hold_out(names, 0.3)
    first, second = [names[place] for place in (*held_out, *training)][:2]
    assert job.spec["config"]["sample_prompts"] == [f"a dress, {first}", f"a dress, {second}"]


def test_too_few_images_for_a_controlnet(handler: TrainHandler, catalog: Catalog) -> None:
    with catalog.transaction() as session:
        session.execute(update(DatasetVersionRow).values(image_count=1))
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(control_request_of(validation_share=0.2))
    assert caught.value.reason == "DATASET_TOO_SMALL"
    assert caught.value.metadata["field"] == "controlnet.validation_share"


def test_a_controlnet_s_batch_has_an_image_for_each_worker(
    settings: Settings, catalog: Catalog, store: ArtifactStore
) -> None:
    handler = TrainHandler(settings.model_copy(update={"train_workers": 4}), catalog, store)
    with pytest.raises(InvalidArgumentError) as caught:
        handler.create(control_request_of(batch_size=2))
    assert caught.value.metadata["field"] == "controlnet.batch_size"


def test_samples_are_judged_by_bases_that_see(
    handler: TrainHandler, catalog: Catalog, store: ArtifactStore, base_files: Files
) -> None:
    judged = {"publish_weights": "best_samples", "sample_interval_steps": 4}
    with pytest.raises(FailedPreconditionError) as caught:
        handler.create(request_of(**judged))
    assert caught.value.reason == "BASE_LACKS_PART"
    assert caught.value.metadata["field"] == "lora.publish_weights"
    publish(store, "bases/tiny/1", {**base_files, "image_encoder/config.json": b"{}"})
    with catalog.transaction() as session:
        session.execute(update(BaseRow).values(artifact="bases/tiny/1"))
    assert handler.create(request_of(**judged))
