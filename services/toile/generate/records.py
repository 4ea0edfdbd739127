"""Generations and their images in the catalog: each change is one transaction."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from PIL import Image
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    BaseRow,
    GenerationAdapterRow,
    GenerationRow,
    ImageRow,
    ModelVersionRow,
)
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.clock import now
from toile.core.context import new_id
from toile.core.errors import FailedPreconditionError, NotFoundError, ToileError
from toile.core.images import fresh_name, put_image
from toile.core.names import GenerationName, ProjectName
from toile.core.settings import Settings
from toile.generate.convert import lineage_of, parameters_of, request_of, request_to_json
from toile.generate.facts import BaseFacts
from toile.generate.resolve import Adapter, resolve
from toile.imaging import png
from toile.v1 import common_pb2, generate_pb2

ABANDONED_SECONDS = 30.0
"""A generation whose process has not been heard of for so long is dead."""


class State(StrEnum):
    """Where a generation is in its life."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class Drawing:
    """A generation in hand: what it is, what it draws with, what it has."""

    row: GenerationRow
    request: generate_pb2.GenerateRequest
    base: BaseRow
    adapters: Sequence[Adapter]
    images: Sequence[ImageRow]

    @property
    def missing(self) -> list[int]:
        """Indices of the images that are still to be drawn."""
        have = {image.producer_index for image in self.images}
        return [index for index in range(self.request.count) if index not in have]


class GenerationRecords:
    """What the service keeps."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: ArtifactStore,
        facts: Callable[[str], BaseFacts],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._facts = facts

    def accept(self, request: generate_pb2.GenerateRequest) -> tuple[str, bool]:
        """Record a request; return the generation's name, and whether it is new.

        Raises:
            RequestReusedError: The request id was sent before with other content.
            ToileError: The request is wrong; nothing is recorded.
        """
        project = ProjectName.parse(request.parent, "parent").project
        key = {
            "scope": f"Generate {request.parent}",
            "request_id": request.request_id,
            "digest": request_digest(request),
        }
        with self._catalog.reading() as session:
            known = recall(session, **key)
            if known is not None:
                return known, False
            plan = resolve(session, self._settings, self._facts, request)
        name = str(GenerationName(project, new_id()))
        with self._catalog.transaction() as session:
            known = recall(session, **key)  # sent twice at the same time
            if known is not None:
                return known, False
            session.add(
                GenerationRow(
                    name=name,
                    project=project,
                    request=request_to_json(plan.request),
                    base=plan.base.name,
                    state=State.RUNNING,
                    heartbeat_time=now(),
                )
            )
            session.add_all(
                GenerationAdapterRow(producer=name, model_version=a.version.name, weight=a.weight)
                for a in plan.adapters
            )
            remember(session, resource=name, **key)
        return name, True

    def claim(self, name: str) -> bool:
        """Take over a generation that ended early; False if it runs or is complete."""
        ended_early = (State.FAILED, State.CANCELLED)
        with self._catalog.transaction() as session:
            row = session.get(GenerationRow, name, with_for_update=True)
            if row is None or row.state not in ended_early:
                return False
            row.state, row.heartbeat_time, row.end_time = State.RUNNING, now(), None
            row.error_reason = row.error_message = ""
            return True

    def load(self, name: str) -> Drawing:
        """Return a generation with all that belongs to it.

        Raises:
            NotFoundError: There is none.
        """
        with self._catalog.reading() as session:
            row = session.get(GenerationRow, name)
            if row is None:
                raise NotFoundError(f"there is no {name}", metadata={"name": name})
            base = session.get_one(BaseRow, row.base)
            used = select(ModelVersionRow, GenerationAdapterRow.weight).join(
                GenerationAdapterRow, GenerationAdapterRow.model_version == ModelVersionRow.name
            )
            request = request_of(row)
            order = [adapter.model for adapter in request.adapters]
            adapters = sorted(
                (
                    Adapter(version, weight)
                    for version, weight in session.execute(
                        used.where(GenerationAdapterRow.producer == name)
                    )
                ),
                key=lambda adapter: order.index(adapter.version.name),
            )
            return Drawing(row, request, base, adapters, images_of(session, [name])[name])

    def add_image(self, drawing: Drawing, index: int, drawn: bytes) -> ImageRow:
        """Store a drawn image with its metadata, artifact first, and return its row.

        Raises:
            FailedPreconditionError: The generation was given up meanwhile.
            ToileError: The store or the catalog does not take it; nothing is visible then.
        """
        row, request = drawing.row, drawing.request
        seed, name = request.seed + index, str(fresh_name(row.project))
        with Image.open(io.BytesIO(drawn), formats=["PNG"]) as picture:
            data = png.encode(
                picture,
                parameters=parameters_of(request, drawing.base, drawing.adapters, seed),
                toile=lineage_of(row.name, name, index, request, drawing.base, drawing.adapters),
            )
            width, height = picture.size
        image = put_image(
            self._store,
            project=row.project,
            name=name,
            data=data,
            width=width,
            height=height,
            origin=common_pb2.IMAGE_ORIGIN_GENERATED,
            producer=row.name,
            producer_index=index,
            prompt=request.prompt,
            seed=seed,
        )
        with self._catalog.transaction() as session:
            _check_running(session, row.name)
            session.add(image)
        return image

    def beat(self, names: Sequence[str]) -> None:
        """Say that these generations are being drawn."""
        if names:
            with self._catalog.transaction() as session:
                alive = update(GenerationRow).where(GenerationRow.name.in_(names))
                session.execute(alive.values(heartbeat_time=now()))

    def succeed(self, name: str) -> None:
        """Record that all images are stored.

        Raises:
            FailedPreconditionError: The generation was given up meanwhile.
        """
        with self._catalog.transaction() as session:
            row = _check_running(session, name)
            row.state, row.end_time = State.SUCCEEDED, now()

    def end(self, name: str, state: State, error: ToileError | None = None) -> None:
        """Record that a generation ended early; its images stay."""
        with self._catalog.transaction() as session:
            row = session.get(GenerationRow, name, with_for_update=True)
            if row is None or row.state != State.RUNNING:
                return
            row.state, row.end_time = state, now()
            if error is not None:
                row.error_reason, row.error_message = error.reason, error.message

    def give_up_abandoned(self) -> int:
        """Mark generations whose process died as failed; return how many."""
        before = now() - timedelta(seconds=ABANDONED_SECONDS)
        dead = (
            update(GenerationRow)
            .where(GenerationRow.state == State.RUNNING, GenerationRow.heartbeat_time < before)
            .values(
                state=State.FAILED,
                end_time=now(),
                error_reason="ABANDONED",
                error_message="the service that drew it is gone",
            )
        )
        with self._catalog.transaction() as session:
            return int(session.execute(dead).rowcount)  # type: ignore[attr-defined]


def images_of(session: Session, producers: Sequence[str]) -> dict[str, list[ImageRow]]:
    """Return the images of each producer, in order."""
    images: dict[str, list[ImageRow]] = {producer: [] for producer in producers}
    made = select(ImageRow).where(ImageRow.producer.in_(producers))
    for image in session.scalars(made.order_by(ImageRow.producer, ImageRow.producer_index)):
        images[image.producer].append(image)
    return images


def _check_running(session: Session, name: str) -> GenerationRow:
    row = session.get_one(GenerationRow, name, with_for_update=True)
    if row.state != State.RUNNING:
        raise FailedPreconditionError(
            f"{name} was given up meanwhile ({row.error_reason or row.state})",
            reason="GENERATION_ENDED",
        )
    return row
