"""Trainings, from the request to the queued job. The servicer calls it from threads."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.bases import list_bases, resolve_base
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    JobRow,
)
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
)
from toile.core.jobs import JobKind, JobStore
from toile.core.names import (
    DatasetName,
    DatasetVersionName,
    ModelName,
    ProjectName,
    check_id,
)
from toile.core.prompts import escape, parse_prompt
from toile.core.settings import Settings
from toile.train.convert import lora_values
from toile.train.registry import missing, next_version
from toile.training.config import LoraRecipeConfig, held_out_count
from toile.v1 import train_pb2

_DEFAULT_SAMPLES = 2


class TrainHandler:
    """Trainings."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._jobs = JobStore(catalog)

    def create(self, request: train_pb2.CreateTrainingJobRequest) -> JobRow:
        """Queue a training.

        Raises:
            InvalidArgumentError: A field is wrong; its path is named.
            NotFoundError: The dataset or the base does not exist.
            FailedPreconditionError: The dataset has no version (`DATASET_NOT_BUILT`), or too few
                images to hold one out (`DATASET_TOO_SMALL`).
            RequestReusedError: The request id was used for something else.
        """
        parent = ProjectName.parse(request.parent, "parent")
        model = ModelName(parent.project, check_id(request.model_id, "model_id"))
        if request.WhichOneof("recipe") is None:
            raise InvalidArgumentError("a recipe is needed; it can be lora: {}", field="recipe")
        config = self._config(request.lora)
        scope, digest = f"CreateTrainingJob {parent}", request_digest(request)
        with self._catalog.transaction() as session:
            known = recall(session, scope=scope, request_id=request.request_id, digest=digest)
            if known is not None:
                return session.get_one(JobRow, known)
            base = resolve_base(session, request.base or self._settings.default_base)
            dataset = _dataset_version(session, parent, request.dataset)
            held_out_count(dataset.image_count, config.validation_share)
            if not config.sample_prompts:
                config = config.model_copy(update={"sample_prompts": _captions(session, dataset)})
            job = self._jobs.create(
                session,
                project=parent.project,
                kind=JobKind.TRAINING,
                target=str(next_version(session, model)),
                spec=self._spec(model, dataset, base, config),
            )
            remember(
                session,
                scope=scope,
                request_id=request.request_id,
                digest=digest,
                resource=job.name,
            )
            return job

    def bases(self) -> Sequence[BaseRow]:
        """Return all bases, by name."""
        with self._catalog.reading() as session:
            return list_bases(session)

    def _config(self, message: train_pb2.LoraConfig) -> LoraRecipeConfig:
        config = LoraRecipeConfig.checked(lora_values(message))
        longest = self._settings.limits.prompt_characters
        for index, prompt in enumerate(config.sample_prompts):
            if len(prompt) > longest:
                raise InvalidArgumentError(
                    f"lora.sample_prompts.{index} has {len(prompt)} characters; "
                    f"{longest} are the most",
                    field=f"lora.sample_prompts.{index}",
                    reason="BAD_CONFIG",
                )
            parse_prompt(prompt, f"lora.sample_prompts.{index}")
        if config.batch_size < self._settings.train_workers:
            raise InvalidArgumentError(
                f"lora.batch_size must be at least {self._settings.train_workers}, "
                "one image for each worker",
                field="lora.batch_size",
                reason="BAD_CONFIG",
            )
        return config

    def _spec(
        self, model: ModelName, dataset: DatasetVersionRow, base: BaseRow, config: LoraRecipeConfig
    ) -> dict[str, Any]:
        return {
            "model": str(model),
            "dataset_version": dataset.name,
            "base": base.name,
            "recipe": "lora",
            "config": config.model_dump(mode="json"),
            "workers": self._settings.train_workers,
        }


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


def _captions(session: Session, dataset: DatasetVersionRow) -> tuple[str, ...]:
    """Captions of the dataset to draw samples of, when a request names no prompts."""
    captions = session.scalars(
        select(DatasetItemRow.caption)
        .where(DatasetItemRow.version == dataset.name, DatasetItemRow.caption != "")
        .order_by(DatasetItemRow.file_name)
    )
    distinct = list(dict.fromkeys(captions))[:_DEFAULT_SAMPLES]
    # Trained on as they stand, so that brackets in them are no emphasis.
    return tuple(escape(caption) for caption in distinct or [dataset.trigger_word])
