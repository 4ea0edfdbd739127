"""Trainings, from the request to the queued job. The servicer calls it from threads."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from toile.core.artifacts import ArtifactStore, read_manifest
from toile.core.bases import check_architecture, check_has_part, list_bases, resolve_base
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    JobRow,
)
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.jobs import JobKind, JobStore
from toile.core.jobs.costs import check_budget
from toile.core.names import (
    DatasetName,
    DatasetVersionName,
    ModelName,
    ProjectName,
    check_id,
)
from toile.core.settings import Settings
from toile.core.tokens import read_tokenizer
from toile.imaging.buckets import KEEP
from toile.imaging.control_maps import ControlKind
from toile.train.convert import recipe_values
from toile.train.estimate import Estimate, estimate
from toile.train.prompts import PromptRules
from toile.train.registry import missing, next_version
from toile.training.checks import (
    check_installed,
    held_out_count,
    lacks_maps,
    lacks_masks,
    sample_order,
)
from toile.training.config import (
    MAPS,
    MASKS,
    RECIPES,
    ControlNetRecipeConfig,
    LoraRecipeConfig,
    RecipeConfig,
)
from toile.training.repeats import repeat_counts
from toile.v1 import train_pb2


class TrainHandler:
    """Trainings."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ArtifactStore) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._jobs = JobStore(catalog)
        self._tokenizers: dict[str, Tokenizer] = {}  # by the base's artifact, which never changes

    def create(self, request: train_pb2.CreateTrainingJobRequest) -> JobRow:
        """Queue a training.

        Raises:
            InvalidArgumentError: A field is wrong; its path is named. Patterns of `repeats` that
                match nothing (`REPEATS_MATCH_NOTHING`) or the same image (`REPEATS_OVERLAP`) too,
                and prompts that the base would not read to their end (`PROMPT_TOO_LONG`), and a
                base of another architecture than SDXL's (`BAD_BASE`).
            NotFoundError: The dataset or the base does not exist.
            FailedPreconditionError: The dataset has no version (`DATASET_NOT_BUILT`), or too few
                images to hold one out (`DATASET_TOO_SMALL`); or maps of parts are asked of a base
                that finds none, or samples are to be judged by one that sees nothing
                (`BASE_LACKS_PART`), or a masked loss of a dataset version that has no masks
                (`DATASET_LACKS_MASKS`), or its images are smaller than the base's own
                (`DATASET_RESOLUTION`); or a prompt asks for what is for adults, and that is
                refused here (`RESTRICTED_CONTENT`), or the dataset is for adults (the same) or
                shows people who did not agree (`PEOPLE_WITHOUT_CONSENT`); or a LoRA is to change
                what the engine takes no LoRAs of (`TARGETS_NOT_SERVED`), or an optimizer needs a
                package that is not installed (`OPTIMIZER_NOT_INSTALLED`); or there is a budget
                and no prices (`NO_PRICES`).
            RequestReusedError: The request id was used for something else.
        """
        parent = ProjectName.parse(request.parent, "parent")
        model = ModelName(parent.project, check_id(request.model_id, "model_id"))
        config = self._config(request)
        budget = request.budget if request.HasField("budget") else None
        check_budget(budget, self._settings.prices)
        scope, digest = f"CreateTrainingJob {parent}", request_digest(request)
        with self._catalog.transaction() as session:
            known = recall(session, scope=scope, request_id=request.request_id, digest=digest)
            if known is not None:
                return session.get_one(JobRow, known)
            base, dataset = self._inputs(session, parent, request, config)
            if not config.sample_prompts:
                config = self._with_default_prompts(session, base, dataset, config)
            job = self._jobs.create(
                session,
                project=parent.project,
                kind=JobKind.TRAINING,
                target=str(next_version(session, model)),
                spec=self._spec(model, dataset, base, config),
                budget=budget,
            )
            remember(
                session,
                scope=scope,
                request_id=request.request_id,
                digest=digest,
                resource=job.name,
            )
            return job

    def estimate(self, request: train_pb2.CreateTrainingJobRequest) -> Estimate | None:
        """Say what a training would take; None if none of its kind has ended well.

        Raises:
            ToileError: As `create`.
        """
        parent = ProjectName.parse(request.parent, "parent")
        check_id(request.model_id, "model_id")
        config = self._config(request)
        with self._catalog.reading() as session:
            base, _ = self._inputs(session, parent, request, config)
            return estimate(session, parent.project, base.name, config)

    def bases(self) -> Sequence[BaseRow]:
        """Return all bases, by name."""
        with self._catalog.reading() as session:
            return list_bases(session)

    def _inputs(
        self,
        session: Session,
        parent: ProjectName,
        request: train_pb2.CreateTrainingJobRequest,
        config: RecipeConfig,
    ) -> tuple[BaseRow, DatasetVersionRow]:
        """What a request trains on, if the recipe can."""
        base = resolve_base(session, request.base or self._settings.default_base)
        dataset = _dataset_version(session, parent, request.dataset)
        held_out_count(dataset.image_count, config.validation_share, recipe=config.RECIPE)
        if config.repeats:
            repeat_counts(config.repeats, _source_names(session, dataset), recipe=config.RECIPE)
        self._check_rights(session.get_one(DatasetRow, dataset.dataset), dataset)
        self._check_base(base, config)
        self._check_dataset(dataset, base, config)
        self._prompt_rules(base).check(config)
        return base, dataset

    def _config(self, request: train_pb2.CreateTrainingJobRequest) -> RecipeConfig:
        recipe = request.WhichOneof("recipe")
        if recipe is None:
            raise InvalidArgumentError(
                "a recipe is needed; it can be lora: {} or controlnet: {}", field="recipe"
            )
        config = RECIPES[recipe].checked(recipe_values(getattr(request, recipe)))
        if isinstance(config, LoraRecipeConfig):
            self._check_served(config)
        # Where there is no torch trainings run elsewhere, with what is installed there.
        if importlib.util.find_spec("torch") is not None:
            check_installed(config)
        if config.batch_size < self._settings.train_workers:
            raise InvalidArgumentError(
                f"{recipe}.batch_size must be at least {self._settings.train_workers}, "
                "one image for each worker",
                field=f"{recipe}.batch_size",
                reason="BAD_CONFIG",
            )
        return config

    def _prompt_rules(self, base: BaseRow) -> PromptRules:
        if base.artifact not in self._tokenizers:
            self._tokenizers[base.artifact] = read_tokenizer(self._store, base.artifact)
        tokenizer = self._tokenizers[base.artifact]
        return PromptRules(
            self._settings, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
        )

    def _with_default_prompts(
        self, session: Session, base: BaseRow, dataset: DatasetVersionRow, config: RecipeConfig
    ) -> RecipeConfig:
        items = session.execute(
            select(DatasetItemRow.file_name, DatasetItemRow.caption)
            .where(DatasetItemRow.version == dataset.name)
            .order_by(DatasetItemRow.file_name)
        ).all()
        captions = [item.caption for item in items]
        if isinstance(config, ControlNetRecipeConfig):  # whose samples have an image each
            names = [item.file_name for item in items]
            order = sample_order(names, config.validation_share, recipe=config.RECIPE)
            captions = [captions[place] for place in order]
        rules = self._prompt_rules(base)
        prompts = rules.defaults(captions, dataset.trigger_word, config)
        config = config.model_copy(update={"sample_prompts": prompts})
        rules.check(config)  # the trigger word itself may be what is refused
        return config

    def _check_served(self, config: LoraRecipeConfig) -> None:
        """Refuse what could be trained and not be drawn with."""
        most = self._settings.engine.max_rank
        if config.rank > most:
            raise InvalidArgumentError(
                f"lora.rank is {config.rank}; this platform's engines take {most} "
                "(TOILE_ENGINE__MAX_RANK)",
                field="lora.rank",
                reason="BAD_CONFIG",
            )
        engine = "any" if config.use_dora else self._settings.engine.targets  # no engine takes it
        if config.target_modules == "transformer" and engine == "attention":
            raise FailedPreconditionError(
                "lora.target_modules: this platform's engine takes LoRAs of attention alone; "
                "TOILE_ENGINE__TARGETS=transformer has it take those of whole transformers",
                reason="TARGETS_NOT_SERVED",
                metadata={"field": "lora.target_modules"},
            )

    def _check_rights(self, dataset: DatasetRow, version: DatasetVersionRow) -> None:
        """Refuse what policy forbids, whether it was said before the version was built or since."""
        settings, sources = self._settings, (version, dataset)
        if settings.restricted_content == "refuse" and any(
            source.content_rating == "RESTRICTED" for source in sources
        ):
            raise FailedPreconditionError(
                f"{version.name} is for adults, and this platform trains on nothing that is "
                "(TOILE_RESTRICTED_CONTENT)",
                reason="RESTRICTED_CONTENT",
                metadata={"field": "dataset"},
            )
        if settings.people_without_consent == "refuse" and any(
            source.people_consent == "NOT_CONSENTED" for source in sources
        ):
            raise FailedPreconditionError(
                f"{version.name} shows people who did not agree to it, and this platform does "
                "not train on them (TOILE_PEOPLE_WITHOUT_CONSENT)",
                reason="PEOPLE_WITHOUT_CONSENT",
                metadata={"field": "dataset"},
            )

    def _check_base(self, base: BaseRow, config: RecipeConfig) -> None:
        """A training that needs what the base lacks is refused before it is queued."""
        check_architecture(self._store, base)
        if isinstance(config, ControlNetRecipeConfig):
            if config.sees_parts:
                check_has_part(self._store, base, "segmenter", "controlnet.control_kind")
            if config.initial_weights == "base":
                own = f"controlnet/{config.control_kind}"
                check_has_part(self._store, base, own, "controlnet.initial_weights")
        if config.publish_weights == "best_samples":
            field = f"{config.RECIPE}.publish_weights"
            check_has_part(self._store, base, "image_encoder", field)

    def _check_dataset(
        self, dataset: DatasetVersionRow, base: BaseRow, config: RecipeConfig
    ) -> None:
        """The same, of the dataset version."""
        if dataset.resolution < base.native_size:
            raise FailedPreconditionError(
                f"{dataset.name} has images of {dataset.resolution} pixels a side, which "
                f"{base.name} would be shown enlarged; build a version with resolution: "
                f"{base.native_size}",
                reason="DATASET_RESOLUTION",
                metadata={
                    "field": "dataset",
                    "resolution": str(dataset.resolution),
                    "native_size": str(base.native_size),
                },
            )
        if dataset.aspect == KEEP:
            _check_buckets(dataset, base, config)
        needs_maps = config.cached.get(MAPS) == ControlKind.GIVEN
        if not (needs_maps or MASKS in config.cached):
            return
        files = read_manifest(self._store, dataset.artifact).files
        if needs_maps and _count(files, "conditioning/") < dataset.image_count:
            raise lacks_maps(dataset.name)
        if MASKS in config.cached and not _count(files, "masks/"):
            raise lacks_masks(dataset.name)

    def _spec(
        self, model: ModelName, dataset: DatasetVersionRow, base: BaseRow, config: RecipeConfig
    ) -> dict[str, Any]:
        return {
            "model": str(model),
            "dataset_version": dataset.name,
            "base": base.name,
            "recipe": config.RECIPE,
            "config": config.model_dump(mode="json"),
            "workers": self._settings.train_workers,
        }


def _count(files: Iterable[str], folder: str) -> int:
    return sum(file.startswith(folder) for file in files)


def _check_buckets(dataset: DatasetVersionRow, base: BaseRow, config: RecipeConfig) -> None:
    """Refuse what images that keep their shape cannot be used for."""
    if dataset.resolution != base.native_size:
        field, why = "dataset", f"{base.name} needs a version with resolution: {base.native_size}"
    elif isinstance(config, ControlNetRecipeConfig):
        field, why = "dataset", "ControlNets are trained on squares; build a version of them"
    elif isinstance(config, LoraRecipeConfig) and config.class_prompt:
        field, why = (
            "lora.class_prompt",
            "images of the class are squares, and so must these be",
        )
    else:
        return
    raise FailedPreconditionError(
        f"{field}: {dataset.name} has images that keep their shape; {why}",
        reason="DATASET_ASPECT",
        metadata={"field": field},
    )


def _dataset_version(session: Session, parent: ProjectName, name: str) -> DatasetVersionRow:
    """The version that a request names, or the newest of the dataset that it names."""
    if DatasetVersionName.matches(name):
        version = DatasetVersionName.parse(name, "dataset")
        dataset, number = version.dataset_name, version.version
    else:
        dataset, number = DatasetName.parse(name, "dataset"), ""
    if dataset.parent != parent:
        raise InvalidArgumentError(
            f"dataset must be one of {parent}, not {name[:200]!r}", field="dataset"
        )
    if session.get(DatasetRow, str(dataset)) is None:
        raise missing(str(dataset))
    statement = select(DatasetVersionRow).where(DatasetVersionRow.dataset == str(dataset))
    if number:
        statement = statement.where(DatasetVersionRow.name == name)
    row = session.scalar(statement.order_by(DatasetVersionRow.number.desc()).limit(1))
    if row is None:
        raise FailedPreconditionError(
            f"{name} is not built; build a version of the dataset first",
            reason="DATASET_NOT_BUILT",
            metadata={"dataset": str(dataset)},
        )
    return row


def _source_names(session: Session, dataset: DatasetVersionRow) -> Sequence[str]:
    """Names that the version's images were imported under."""
    return session.scalars(
        select(DatasetItemRow.source_file_name)
        .where(DatasetItemRow.version == dataset.name)
        .order_by(DatasetItemRow.file_name)
    ).all()
