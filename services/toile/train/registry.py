"""Models and their versions: read, named by aliases, advised against."""

from collections.abc import Generator, Sequence

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore, read_manifest
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow, ModelAliasRow, ModelRow, ModelVersionRow
from toile.core.catalog.paging import page
from toile.core.catalog.versions import find_version
from toile.core.clock import now
from toile.core.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from toile.core.jobs import FINAL_STATES, JobKind
from toile.core.jobs.costs import Usage
from toile.core.names import ModelAliasName, ModelName, ModelVersionName, ProjectName
from toile.core.rpc.uploads import chunks
from toile.train.convert import ModelView, VersionView

MAX_REASON_CHARACTERS = 500


class ModelRegistry:
    """The models of all projects. Synchronous."""

    def __init__(self, catalog: Catalog, store: ArtifactStore) -> None:
        self._catalog = catalog
        self._store = store

    def model(self, name: ModelName) -> ModelView:
        """Return a model that has a version.

        Raises:
            NotFoundError: There is none.
        """
        with self._catalog.reading() as session:
            views = _views(session, [_model(session, name)])
        if not views:
            raise missing(str(name))
        return views[0]

    def models(
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

    def version(self, name: ModelVersionName | ModelAliasName) -> VersionView:
        """Return a version, by its name or by an alias.

        Raises:
            NotFoundError: There is none of this name.
        """
        with self._catalog.reading() as session:
            row = find_version(session, str(name))
            if row is None:
                raise missing(str(name))
            return version_views(session, [row])[0]

    def versions(
        self, parent: ModelName, page_size: int, page_token: str
    ) -> tuple[Sequence[VersionView], str]:
        """Return a page of a model's versions, newest first.

        Raises:
            NotFoundError: There is no such model.
        """
        with self._catalog.reading() as session:
            _model(session, parent)
            rows, token = page(
                session,
                select(ModelVersionRow).where(ModelVersionRow.model == str(parent)),
                (ModelVersionRow.number,),
                page_size=page_size,
                page_token=page_token,
                scope=f"ListModelVersions {parent}",
                descending=True,
            )
            return version_views(session, rows), token

    def read_file(self, name: ModelVersionName, path: str) -> Generator[bytes, None, None]:
        """Return a file of a version, piece by piece.

        Raises:
            NotFoundError: There is no such version or file.
        """
        row = self.version(name).row
        if path not in {file["path"] for file in row.files}:
            raise NotFoundError(
                f"{name} has no file {path[:200]!r}",
                reason="FILE_NOT_FOUND",
                metadata={"name": str(name)},
            )
        key = read_manifest(self._store, row.artifact).key(row.artifact, path)
        with self._store.open(key) as file:
            yield from chunks(file)

    def deprecate(self, name: ModelVersionName, reason: str) -> VersionView:
        """Advise against a version; said again, the reason is replaced and the time stays.

        Raises:
            NotFoundError: There is no such version.
            InvalidArgumentError: The reason is empty or too long.
        """
        reason = reason.strip()
        if not 0 < len(reason) <= MAX_REASON_CHARACTERS:
            raise InvalidArgumentError(
                f"reason must have 1 to {MAX_REASON_CHARACTERS} characters, not {len(reason)}",
                field="reason",
            )
        with self._catalog.transaction() as session:
            row = locked_version(session, name)
            row.deprecate_time = row.deprecate_time or now()
            row.deprecation_reason = reason
            return version_views(session, [row])[0]

    def set_alias(self, name: ModelAliasName, version: str) -> ModelAliasRow:
        """Point an alias to a version of its model: who resolves it sees the one or the other.

        Raises:
            InvalidArgumentError: The version is of another model.
            NotFoundError: There is no such version.
            FailedPreconditionError: The version is deprecated (`VERSION_DEPRECATED`).
        """
        wanted = ModelVersionName.parse(version, "version")
        if wanted.model_name != name.model_name:
            raise InvalidArgumentError(
                f"version must be one of {name.model_name}, not {version}", field="version"
            )
        with self._catalog.transaction() as session:
            # The model's row is locked, so that two that make the alias wait for one another.
            _model(session, name.model_name, lock=True)
            if locked_version(session, wanted).deprecate_time is not None:
                raise FailedPreconditionError(
                    f"{wanted} is deprecated, so no alias can be pointed to it",
                    reason="VERSION_DEPRECATED",
                    metadata={"version": str(wanted)},
                )
            row = session.get(ModelAliasRow, str(name), populate_existing=True)
            if row is None:
                row = ModelAliasRow(name=str(name), model=str(name.model_name))
                session.add(row)
            row.version, row.update_time = str(wanted), now()
            return row

    def delete_alias(self, name: ModelAliasName) -> None:
        """Remove an alias.

        Raises:
            NotFoundError: There is no such alias.
        """
        with self._catalog.transaction() as session:
            row = session.get(ModelAliasRow, str(name), with_for_update=True)
            if row is None:
                raise missing(str(name))
            session.delete(row)


def next_version(session: Session, model: ModelName) -> ModelVersionName:
    """Return the first number that no version has or had and no training is about to have.

    The model is made when it does not exist, and locked until the transaction ends.
    """
    # Locked, so that two requests do not take the same number.
    row = session.get(ModelRow, str(model), with_for_update=True)
    if row is None:
        row = ModelRow(name=str(model), project=model.project, retired_number=0)
        session.add(row)
        session.flush()
    published = session.scalar(
        select(func.max(ModelVersionRow.number)).where(ModelVersionRow.model == str(model))
    )
    coming = [int(target.version) for _, target in versions_coming(session, model)]
    number = max([published or 0, row.retired_number, *coming]) + 1
    return ModelVersionName(model.project, model.model, str(number))


def versions_coming(session: Session, model: ModelName) -> list[tuple[JobRow, ModelVersionName]]:
    """Return the trainings under way that make versions of a model, with the versions' names."""
    jobs = session.scalars(
        select(JobRow).where(
            JobRow.kind == JobKind.TRAINING.value,
            JobRow.project == model.project,
            JobRow.state.not_in([state.value for state in FINAL_STATES]),
        )
    )
    targets = [(job, ModelVersionName.parse(job.target)) for job in jobs]
    return [(job, target) for job, target in targets if target.model_name == model]


def locked_version(session: Session, name: ModelVersionName) -> ModelVersionRow:
    """Return a version's row, locked until the transaction ends.

    Raises:
        NotFoundError: There is no such version.
    """
    row = session.get(ModelVersionRow, str(name), with_for_update=True)
    if row is None:
        raise missing(str(name))
    return row


def version_views(session: Session, rows: Sequence[ModelVersionRow]) -> list[VersionView]:
    """Return versions with the aliases that point to them."""
    pointed = select(ModelAliasRow).where(ModelAliasRow.version.in_([row.name for row in rows]))
    aliases = session.scalars(pointed.order_by(ModelAliasRow.name)).all()
    return [VersionView(row, [a.name for a in aliases if a.version == row.name]) for row in rows]


def missing(name: str) -> NotFoundError:
    """Return the error of a name that nothing has."""
    return NotFoundError(f"{name} does not exist", metadata={"name": name})


def _model(session: Session, name: ModelName, *, lock: bool = False) -> ModelRow:
    row = session.get(ModelRow, str(name), with_for_update=True if lock else None)
    if row is None:
        raise missing(str(name))
    return row


def _views(session: Session, rows: Sequence[ModelRow]) -> list[ModelView]:
    """Models with their versions and aliases; those without versions are left out."""
    names = [row.name for row in rows]
    of_models = select(ModelVersionRow).where(ModelVersionRow.model.in_(names))
    versions: dict[str, list[ModelVersionRow]] = {}
    for version in session.scalars(of_models.order_by(ModelVersionRow.number)):
        versions.setdefault(version.model, []).append(version)
    pointed = select(ModelAliasRow).where(ModelAliasRow.model.in_(names))
    aliases: dict[str, list[ModelAliasRow]] = {}
    for alias in session.scalars(pointed.order_by(ModelAliasRow.name)):
        aliases.setdefault(alias.model, []).append(alias)
    usage = _usage(session, list(versions))
    return [
        ModelView(row, versions[row.name], aliases.get(row.name, []), usage[row.name])
        for row in rows
        if row.name in versions
    ]


def _usage(session: Session, models: Sequence[str]) -> dict[str, Usage]:
    """What all trainings took that were to make versions of models, by the model's name."""
    taken = dict.fromkeys(models, Usage())
    if not models:
        return taken
    jobs = session.execute(
        select(JobRow.target, JobRow.cpu_seconds, JobRow.gpu_seconds).where(
            JobRow.kind == JobKind.TRAINING.value,
            or_(*(JobRow.target.startswith(f"{name}/") for name in models)),
        )
    )
    for target, cpu_seconds, gpu_seconds in jobs:
        model = str(ModelVersionName.parse(target).model_name)
        taken[model] += Usage(cpu_seconds, gpu_seconds)
    return taken
