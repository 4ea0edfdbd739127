"""Generations and their images in the catalog: each change is one transaction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from PIL import Image
from sqlalchemy import func, select, update
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
from toile.core.content import restricted_term
from toile.core.context import new_id
from toile.core.errors import FailedPreconditionError, NotFoundError, ToileError
from toile.core.images import fresh_name, put_image
from toile.core.names import GenerationName, ProjectName
from toile.core.settings import Settings
from toile.generate.adapters import Adapter
from toile.generate.controls import IMAGE_FIELD, Control, control_images, resolve_controls
from toile.generate.convert import lineage_of, parameters_of, request_of, request_to_json
from toile.generate.facts import BaseFacts
from toile.generate.prompts import prompts_of, seeds_of
from toile.generate.resolve import Plan, Resolver
from toile.generate.sources import Source, find_image, find_source, read_image, read_source
from toile.generate.starts import Start, fitted, make_start
from toile.imaging.canvas import UInt8Array
from toile.imaging.formats import ImageFormat, encode
from toile.imaging.seams import Repeat, seam_score
from toile.v1 import common_pb2, generate_pb2

ABANDONED_SECONDS = 30.0
"""A generation whose process has not been heard of for so long is dead."""


class State(StrEnum):
    """Where a generation is in its life."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


_FORMATS = {
    generate_pb2.IMAGE_FORMAT_UNSPECIFIED: ImageFormat.PNG,  # of a generation of the first release
    generate_pb2.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    generate_pb2.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
    generate_pb2.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
}


@dataclass(frozen=True)
class Drawing:
    """A generation in hand: what it is, what it draws with and from, what it has.

    Seeds and prompts are those of each image. The source is None for what starts from noise, and
    for what is done, which has no controls either.
    """

    row: GenerationRow
    request: generate_pb2.GenerateRequest
    base: BaseRow
    adapters: Sequence[Adapter]
    controls: Sequence[Control]
    source: Source | None
    seeds: Sequence[int]
    prompts: Sequence[str]
    images: Sequence[ImageRow]

    @property
    def missing(self) -> Sequence[int]:
        """Indices of the images that are still to be drawn."""
        have = {image.producer_index for image in self.images}
        return [index for index in range(len(self.seeds)) if index not in have]


class GenerationRecords:
    """What the service keeps."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: ArtifactStore,
        facts: Callable[[str], BaseFacts],
    ) -> None:
        self._limits = settings.limits
        self._catalog = catalog
        self._store = store
        self._facts = facts
        self._resolver = Resolver(settings, store, facts)

    def find(self, request: generate_pb2.GenerateRequest) -> str | None:
        """Return the generation that a request made when it was sent before.

        Raises:
            RequestReusedError: The request id was sent before with other content.
        """
        ProjectName.parse(request.parent, "parent")
        with self._catalog.reading() as session:
            return recall(session, **_identity(request))

    def plan(self, request: generate_pb2.GenerateRequest) -> Plan:
        """Check a request; see `Resolver.resolve`. Nothing is recorded."""
        with self._catalog.reading() as session:
            return self._resolver.resolve(session, request)

    def holding_edges(self, request: generate_pb2.GenerateRequest) -> generate_pb2.GenerateRequest:
        """See `Resolver.holding_edges`."""
        with self._catalog.reading() as session:
            return self._resolver.holding_edges(session, request)

    def with_caption(self, plan: Plan, caption: str) -> Plan:
        """See `Resolver.with_caption`."""
        return self._resolver.with_caption(plan, caption)

    def add(self, request: generate_pb2.GenerateRequest, plan: Plan) -> tuple[str, bool]:
        """Record a request; return the generation's name, and whether it is new.

        Raises:
            RequestReusedError: The request id was sent meanwhile with other content.
            NotFoundError: An image that it is drawn from was deleted meanwhile.
        """
        name = str(GenerationName(plan.project, new_id()))
        with self._catalog.transaction() as session:
            known = recall(session, **_identity(request))  # sent twice at the same time
            if known is not None:
                return known, False
            find_source(session, plan.project, plan.request, for_use=True)
            for field, image in control_images(plan.request):
                find_image(session, plan.project, field, image, for_use=True)
            session.add(
                GenerationRow(
                    name=name,
                    project=plan.project,
                    request=request_to_json(plan.request),
                    base=plan.base.name,
                    state=State.RUNNING,
                    heartbeat_time=now(),
                )
            )
            session.add_all(
                GenerationAdapterRow(producer=name, model_version=version, weight=weight)
                for version, weight in _weights(plan).items()
            )
            remember(session, resource=name, **_identity(request))
        return name, True

    def queue_position(self, name: str) -> int:
        """Return how many generations began before this one and are not done."""
        with self._catalog.reading() as session:
            row = session.get(GenerationRow, name)
            if row is None or row.state != State.RUNNING:
                return 0
            earlier = select(func.count()).where(
                GenerationRow.state == State.RUNNING, GenerationRow.create_time < row.create_time
            )
            return session.scalar(earlier) or 0

    def claim(self, name: str) -> tuple[str, bool]:
        """Take over a generation that ended early; return its name, and whether it was taken.

        It is not when it runs or is complete.
        """
        ended_early = (State.FAILED, State.CANCELLED)
        with self._catalog.transaction() as session:
            row = session.get(GenerationRow, name, with_for_update=True)
            if row is None or row.state not in ended_early:
                return name, False
            row.state, row.heartbeat_time, row.end_time = State.RUNNING, now(), None
            row.error_reason = row.error_message = ""
            return name, True

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
            done = row.state == State.SUCCEEDED  # then its source may have been deleted since
            source = None if done else find_source(session, row.project, request)
            controls: list[Control] = []
            if not done:
                facts = self._facts(base.artifact)
                controls = resolve_controls(session, row.project, base, facts, request)
            order = [adapter.model for adapter in request.adapters]
            schedules = {adapter.model: adapter.schedule for adapter in request.adapters}
            adapters = sorted(
                (
                    Adapter(version, weight, schedules[version.name])
                    for version, weight in session.execute(
                        used.where(
                            GenerationAdapterRow.producer == name, ModelVersionRow.name.in_(order)
                        )
                    )
                ),
                key=lambda adapter: order.index(adapter.version.name),
            )
            return Drawing(
                row=row,
                request=request,
                base=base,
                adapters=adapters,
                controls=controls,
                source=source,
                seeds=seeds_of(request),
                prompts=prompts_of(request, self._limits.prompt_characters),
                images=images_of(session, [name])[name],
            )

    def start(self, drawing: Drawing) -> Start:
        """Read what a generation starts from.

        Raises:
            ToileError: The image or its mask is not there any more, or damaged.
        """
        if drawing.source is None:
            return make_start(drawing.request, None)
        pixels = read_source(self._store, self._limits, drawing.request, drawing.source)
        return make_start(drawing.request, pixels)

    def control_images(self, drawing: Drawing) -> list[UInt8Array]:
        """Read what the ControlNets are shown of, each `[H, W, 3]` at the drawing's size.

        Raises:
            ToileError: An image is damaged.
        """
        return [
            fitted(
                read_image(self._store, self._limits, control.image, IMAGE_FIELD),
                drawing.request,
            )
            for control in drawing.controls
        ]

    def add_image(self, drawing: Drawing, index: int, pixels: UInt8Array) -> ImageRow:
        """Store a finished image with its metadata, artifact first, and return its row.

        Raises:
            FailedPreconditionError: The generation was given up meanwhile.
            ToileError: The store or the catalog does not take it; nothing is visible then.
        """
        row, request, source = drawing.row, drawing.request, drawing.source
        about = (request, drawing.base, drawing.adapters, drawing.controls)
        prompt, seed, name = drawing.prompts[index], drawing.seeds[index], fresh_name(row.project)
        picture, image_format = Image.fromarray(pixels), _FORMATS[request.output.format]
        data = encode(
            picture,
            image_format,
            quality=request.output.quality,
            parameters=parameters_of(*about, prompt, seed, picture.size),
            toile=lineage_of(row.name, str(name), index, *about, prompt, seed),
        )
        image = put_image(
            self._store,
            project=row.project,
            name=str(name),
            data=data,
            width=picture.width,
            height=picture.height,
            origin=common_pb2.IMAGE_ORIGIN_GENERATED,
            media_type=image_format.value,
            producer=row.name,
            producer_index=index,
            parent_image=source.image.name if source else "",
            prompt=prompt,
            seed=seed,
            restricted=(source is not None and source.restricted != "")
            or any(control.is_restricted for control in drawing.controls)
            or restricted_term(prompt) is not None,
            seam_score=seam_score(picture, Repeat(request.repeat)) if request.repeat else None,
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


def _weights(plan: Plan) -> dict[str, float]:
    """Return how far each model version counts; of a ControlNet that holds twice, the most."""
    weights = {adapter.version.name: adapter.weight for adapter in plan.adapters}
    for control in plan.controls:
        if control.version is not None:
            name = control.version.name
            weights[name] = max(control.wanted.scale, weights.get(name, 0.0))
    return weights


def _identity(request: generate_pb2.GenerateRequest) -> dict[str, str]:
    return {
        "scope": f"Generate {request.parent}",
        "request_id": request.request_id,
        "digest": request_digest(request),
    }


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
