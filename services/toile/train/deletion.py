"""Deleting versions that nothing refers to, and models without versions."""

from collections.abc import Mapping

import structlog
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore
from toile.core.artifacts.manifest import MANIFEST
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    GenerationAdapterRow,
    GenerationRow,
    ImageRow,
    ModelAliasRow,
    ModelRow,
    ModelVersionRow,
    RequestRow,
)
from toile.core.errors import FailedPreconditionError, ToileError
from toile.core.names import ModelName, ModelVersionName
from toile.train.registry import locked_version, missing, versions_coming

_log = structlog.stdlib.get_logger(__name__)


class Deletion:
    """Removes rows in one transaction, then the bytes."""

    def __init__(self, catalog: Catalog, store: ArtifactStore) -> None:
        self._catalog = catalog
        self._store = store

    def version(self, name: ModelVersionName) -> str:
        """Delete a version with its files; return its artifact, for those who may hold it yet.

        Its number is not used again while the model exists.

        Raises:
            NotFoundError: There is no such version.
            FailedPreconditionError: Something refers to it, or a job is making it; metadata says
                what, and how many (`MODEL_IN_USE`).
        """
        with self._catalog.transaction() as session:
            model = session.get(ModelRow, str(name.model_name), with_for_update=True)
            if model is None:
                raise missing(str(name))
            coming = [job for job, target in versions_coming(session, name.model_name)]
            making = [job for job in coming if job.target == str(name)]
            _check_unused(str(name), {"jobs": len(making)})
            row = locked_version(session, name)
            _check_unused(row.name, _uses(session, row.name))
            _forget_requests(session, row.name)
            session.delete(row)
            model.retired_number = max(model.retired_number, row.number)
        forget_artifact(self._store, row.artifact)
        return row.artifact

    def model(self, name: ModelName) -> None:
        """Delete a model that has no versions.

        Raises:
            NotFoundError: There is no such model.
            FailedPreconditionError: It has versions, or a job is making one (`MODEL_IN_USE`).
        """
        with self._catalog.transaction() as session:
            row = session.get(ModelRow, str(name), with_for_update=True)
            if row is None:
                raise missing(str(name))
            versions = select(func.count()).where(ModelVersionRow.model == row.name)
            uses = {
                "versions": session.scalar(versions) or 0,
                "jobs": len(versions_coming(session, name)),
            }
            _check_unused(row.name, uses)
            session.delete(row)


def forget_artifact(store: ArtifactStore, artifact: str) -> None:
    """Remove a version's folder, the manifest first, and what was packed of it for engines."""
    try:
        store.delete(f"{artifact}/{MANIFEST}")
        for folder in (f"{artifact}/", f"{artifact}.bank/"):
            for info in list(store.list(folder)):
                store.delete(info.key)
    except ToileError as error:  # nobody can name the bytes any more
        _log.warning("left bytes behind", artifact=artifact, reason=error.reason)


def _uses(session: Session, version: str) -> dict[str, int]:
    """Count what refers to a version, by kind."""
    drawn = select(GenerationAdapterRow.producer).where(
        GenerationAdapterRow.model_version == version
    )
    running = select(func.count()).where(
        GenerationRow.name.in_(drawn), GenerationRow.state == "RUNNING"
    )
    counts = {
        # The running ones first: what ends meanwhile has its images by the time they are counted.
        "running_generations": running,
        "images": select(func.count()).where(ImageRow.producer.in_(drawn)),
        "aliases": select(func.count()).where(ModelAliasRow.version == version),
    }
    return {use: session.scalar(statement) or 0 for use, statement in counts.items()}


def _check_unused(name: str, uses: Mapping[str, int]) -> None:
    found = {use: str(count) for use, count in uses.items() if count}
    if found:
        what = ", ".join(f"{use.replace('_', ' ')}: {count}" for use, count in found.items())
        raise FailedPreconditionError(
            f"{name} is in use ({what}), so it is kept",
            reason="MODEL_IN_USE",
            metadata={"name": name, **found},
        )


def _forget_requests(session: Session, version: str) -> None:
    """Forget who asked for a version's import, and for drawings with it that have no images.

    Such a drawing may have failed; asked for again it would go on, without the adapter.
    """
    producers = select(GenerationAdapterRow.producer).where(
        GenerationAdapterRow.model_version == version
    )
    session.execute(
        delete(RequestRow)
        .where(RequestRow.resource.in_(producers) | (RequestRow.resource == version))
        .execution_options(synchronize_session=False)
    )
    session.execute(
        delete(GenerationAdapterRow).where(GenerationAdapterRow.model_version == version)
    )
