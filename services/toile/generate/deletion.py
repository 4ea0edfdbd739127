"""Deleting images and generations that nothing else depends on."""

from collections.abc import Iterable, Sequence

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    GenerationAdapterRow,
    GenerationRow,
    ImageRow,
    RefinementRow,
    RequestRow,
    ScoreRow,
)
from toile.core.errors import FailedPreconditionError, NotFoundError, ToileError
from toile.core.names import GenerationName, ImageName
from toile.generate.controls import control_images
from toile.generate.convert import request_of
from toile.generate.records import State, images_of
from toile.generate.sources import source_names

_log = structlog.stdlib.get_logger(__name__)


class Deletion:
    """Removes rows in one transaction, then the bytes."""

    def __init__(self, catalog: Catalog, store: ArtifactStore) -> None:
        self._catalog = catalog
        self._store = store

    def image(self, name: str) -> None:
        """Delete an image, and the refinement that made it.

        Raises:
            NotFoundError: There is no such image.
            FailedPreconditionError: It is ranked, refined, redrawn or being redrawn
                (`IMAGE_IN_USE`).
        """
        ImageName.parse(name)
        with self._catalog.transaction() as session:
            row = session.get(ImageRow, name, with_for_update=True)
            if row is None:
                raise NotFoundError(f"there is no {name}", metadata={"name": name})
            _check_unused(session, row.project, [row.name])
            _delete_refinements(session, row)
            session.delete(row)
        self._forget([row])

    def generation(self, name: str) -> None:
        """Delete a generation that has ended, with its images: all of it or nothing.

        Raises:
            NotFoundError: There is none.
            FailedPreconditionError: It is being drawn (`GENERATION_RUNNING`), or one of its
                images is in use (`IMAGE_IN_USE`).
        """
        GenerationName.parse(name)
        with self._catalog.transaction() as session:
            row = session.get(GenerationRow, name, with_for_update=True)
            if row is None:
                raise NotFoundError(f"there is no {name}", metadata={"name": name})
            if row.state == State.RUNNING:
                raise FailedPreconditionError(
                    f"{name} is being drawn; cancel its call first", reason="GENERATION_RUNNING"
                )
            images = images_of(session, [name])[name]
            _check_unused(session, row.project, [image.name for image in images])
            for image in images:
                session.delete(image)
            _delete_producer(session, f"Generate projects/{row.project}", name)
            session.delete(row)
        self._forget(images)

    def _forget(self, images: Iterable[ImageRow]) -> None:
        for image in images:
            try:
                self._store.delete(image.artifact)
            except ToileError as error:  # nobody can see the bytes any more
                _log.warning("left bytes behind", artifact=image.artifact, reason=error.reason)


def _check_unused(session: Session, project: str, names: Sequence[str]) -> None:
    # The running ones first: what ends meanwhile has its images by the time they are looked for.
    running = select(GenerationRow).where(
        GenerationRow.project == project, GenerationRow.state == State.RUNNING
    )
    for row in session.scalars(running):
        request = request_of(row)
        for _, name in (*source_names(request), *control_images(request)):
            if name in names:
                raise _in_use(name, "what a running generation is drawn from")
    uses = {
        "ranked": select(ScoreRow.image).where(ScoreRow.image.in_(names)),
        "refined": select(RefinementRow.source_image).where(RefinementRow.source_image.in_(names)),
        "what another image was made from": select(ImageRow.parent_image).where(
            ImageRow.parent_image.in_(names)
        ),
    }
    for use, statement in uses.items():
        if (used := session.scalar(statement.limit(1))) is not None:
            raise _in_use(used, use)


def _in_use(name: str, use: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{name} is {use}, so it is kept",
        reason="IMAGE_IN_USE",
        metadata={"name": name, "use": use},
    )


def _delete_refinements(session: Session, image: ImageRow) -> None:
    made = select(RefinementRow).where(RefinementRow.image == image.name)
    for row in session.scalars(made).all():
        _delete_producer(session, f"RefineImage projects/{row.project}", row.name)
        session.delete(row)
    session.flush()  # they refer to the image


def _delete_producer(session: Session, scope: str, name: str) -> None:
    """Delete what else is known of a generation or a refinement; its request may come again."""
    session.execute(delete(GenerationAdapterRow).where(GenerationAdapterRow.producer == name))
    asked = delete(RequestRow).where(RequestRow.scope == scope, RequestRow.resource == name)
    session.execute(asked)
