"""What the train service decides. Synchronous; the servicer calls it from threads."""

from collections.abc import Generator, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore, read_manifest
from toile.core.bases import list_bases, resolve_base
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    JobRow,
    ModelRow,
    ModelVersionRow,
)
from toile.core.catalog.paging import page
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from toile.core.jobs import FINAL_STATES, JobKind, JobStore
from toile.core.names import (
    DatasetName,
    DatasetVersionName,
    ModelName,
    ModelVersionName,
    ProjectName,
    check_id,
)
from toile.core.prompts import escape, parse_prompt
from toile.core.rpc.uploads import chunks
from toile.core.settings import Settings
from toile.train.convert import ModelView, lora_values
from toile.training.config import LoraRecipeConfig
from toile.v1 import train_pb2

_DEFAULT_SAMPLES = 2


class TrainHandler:
    """Trainings, and the models they become."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ArtifactStore) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._jobs = JobStore(catalog)

    def create(self, request: train_pb2.CreateTrainingJobRequest) -> JobRow:
        """Queue a training.

        Raises:
            InvalidArgumentError: A field is wrong; its path is named.
            NotFoundError: The dataset or the base does not exist.
            FailedPreconditionError: The dataset has no version (`DATASET_NOT_BUILT`).
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
            if not config.sample_prompts:
                config = config.model_copy(update={"sample_prompts": _captions(session, dataset)})
            job = self._jobs.create(
                session,
                project=parent.project,
                kind=JobKind.TRAINING,
                target=str(_next_version(session, model)),
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

    def get_model(self, name: ModelName) -> ModelView:
        """Return a model that has a version.

        Raises:
            NotFoundError: There is none.
        """
        with self._catalog.reading() as session:
            views = _views(session, [_model(session, name)])
        if not views:
            raise _missing(str(name))
        return views[0]

    def list_models(
        self, parent: ProjectName, page_size: int, page_token: str
    ) -> tuple[Sequence[ModelView], str]:
        """Return a page of a project's models that have a version, by name."""
        published = select(ModelVersionRow.model).where(ModelVersionRow.model == ModelRow.name)
        with self._catalog.reading() as session:
            rows, token = page(
                session,
                select(ModelRow).where(ModelRow.project == parent.project, published.exists()),
                (ModelRow.name,),
                page_size=page_size,
                page_token=page_token,
                scope=f"ListModels {parent}",
            )
            return _views(session, rows), token

    def get_version(self, name: ModelVersionName) -> ModelVersionRow:
        """Return a version.

        Raises:
            NotFoundError: There is none of this name.
        """
        with self._catalog.reading() as session:
            row = session.get(ModelVersionRow, str(name))
        if row is None:
            raise _missing(str(name))
        return row

    def list_versions(
        self, parent: ModelName, page_size: int, page_token: str
    ) -> tuple[Sequence[ModelVersionRow], str]:
        """Return a page of a model's versions, newest first.

        Raises:
            NotFoundError: There is no such model.
        """
        with self._catalog.reading() as session:
            _model(session, parent)
            return page(
                session,
                select(ModelVersionRow).where(ModelVersionRow.model == str(parent)),
                (ModelVersionRow.number,),
                page_size=page_size,
                page_token=page_token,
                scope=f"ListModelVersions {parent}",
                descending=True,
            )

    def read_file(self, name: ModelVersionName, path: str) -> Generator[bytes, None, None]:
        """Return a file of a version, piece by piece.

        Raises:
            NotFoundError: There is no such version or file.
        """
        row = self.get_version(name)
        if path not in {file["path"] for file in row.files}:
            raise NotFoundError(
                f"{name} has no file {path[:200]!r}",
                reason="FILE_NOT_FOUND",
                metadata={"name": str(name)},
            )
        key = read_manifest(self._store, row.artifact).key(row.artifact, path)
        with self._store.open(key) as file:
            yield from chunks(file)

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
        raise _missing(str(dataset))
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


def _next_version(session: Session, model: ModelName) -> ModelVersionName:
    """The first number that no version has and no training under way is about to have."""
    # Locked, so that two requests do not take the same number.
    row = session.get(ModelRow, str(model), with_for_update=True)
    if row is None:
        session.add(ModelRow(name=str(model), project=model.project))
        session.flush()
    published = session.scalar(
        select(func.max(ModelVersionRow.number)).where(ModelVersionRow.model == str(model))
    )
    targets = session.scalars(
        select(JobRow.target).where(
            JobRow.kind == JobKind.TRAINING.value,
            JobRow.project == model.project,
            JobRow.state.not_in([state.value for state in FINAL_STATES]),
        )
    )
    parsed = [ModelVersionName.parse(target) for target in targets]
    coming = [int(target.version) for target in parsed if target.model_name == model]
    return ModelVersionName(model.project, model.model, str(max([published or 0, *coming]) + 1))


def _model(session: Session, name: ModelName) -> ModelRow:
    row = session.get(ModelRow, str(name))
    if row is None:
        raise _missing(str(name))
    return row


def _views(session: Session, rows: Sequence[ModelRow]) -> list[ModelView]:
    """Models with their versions; those without any are left out."""
    names = [row.name for row in rows]
    versions = session.scalars(
        select(ModelVersionRow)
        .where(ModelVersionRow.model.in_(names))
        .order_by(ModelVersionRow.number)
    )
    of_model: dict[str, list[ModelVersionRow]] = {}
    for version in versions:
        of_model.setdefault(version.model, []).append(version)
    return [
        ModelView(row, of_model[row.name][-1], of_model[row.name][0])
        for row in rows
        if row.name in of_model
    ]


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"{name} does not exist", metadata={"name": name})
