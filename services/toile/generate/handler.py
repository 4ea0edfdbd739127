"""What Generate does: record, draw, store, tell; and what becomes of it when it is cut short."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import ParamSpec, TypeAlias, TypeVar

import structlog

from toile.core.catalog.models import ImageRow
from toile.core.errors import ComputeUnavailableError, DeadlineError, ToileError
from toile.core.images import image_to_proto
from toile.core.inference import Inference
from toile.core.prompts import escape
from toile.core.rpc.mapping import to_error
from toile.generate.convert import drawing_of, generation_to_proto
from toile.generate.deadline import Deadline
from toile.generate.maps import control_maps
from toile.generate.records import Drawing, GenerationRecords, State
from toile.generate.resolve import Plan
from toile.generate.starts import Start
from toile.imaging.canvas import decode_png, thumbnail
from toile.v1 import generate_pb2, inference_pb2

FOLLOW_INTERVAL_SECONDS = 0.5
BEAT_INTERVAL_SECONDS = 5.0
SEEN_SIDE_PIXELS = 1024
"""The captioner sees images at most this large."""

Models: TypeAlias = Callable[[], Inference]
"""Gives the client of the models, which is opened in the loop that uses it."""

P = ParamSpec("P")
R = TypeVar("R")

_log = structlog.stdlib.get_logger(__name__)


class GenerateHandler:
    """Draws generations. Each has one owner at a time, whose heartbeat the catalog holds."""

    def __init__(self, records: GenerationRecords, models: Models) -> None:
        self._records = records
        self._models = models
        self._drawing: set[str] = set()

    async def generate(
        self, request: generate_pb2.GenerateRequest, deadline: Deadline | None = None
    ) -> AsyncGenerator[generate_pb2.GenerateResponse, None]:
        """Yield the events of a generation.

        A request id that was sent before gets the same generation: a finished one is replayed,
        one that is being drawn is followed, one that ended early goes on with what is missing.

        Raises:
            ToileError: The request is wrong, the deadline has passed, or what is behind does not
                answer.
        """
        deadline = deadline or Deadline()
        deadline.seconds_left()
        name, new = await asyncio.to_thread(self._records.find, request), False
        if name is None:
            plan = await self._plan(request)
            deadline.seconds_left()  # what nobody waits for is not begun
            name, new = await self._own(self._records.add, request, plan)
        ours, told = new, set[str]()
        if not ours:
            yield await self._accepted(name)
        while not ours:
            drawing = await asyncio.to_thread(self._records.load, name)
            for image in drawing.images:
                if image.name not in told:
                    told.add(image.name)
                    yield _image_event(image)
            if drawing.row.state == State.SUCCEEDED:
                yield _summary(drawing)
                return
            _, ours = await self._own(self._records.claim, name)
            if not ours:
                await asyncio.sleep(FOLLOW_INTERVAL_SECONDS)
        async with contextlib.aclosing(self._draw(name, told, deadline, new=new)) as events:
            async for event in events:
                yield event

    async def holding_edges(
        self, request: generate_pb2.GenerateRequest
    ) -> generate_pb2.GenerateRequest:
        """See `Resolver.holding_edges`."""
        return await asyncio.to_thread(self._records.holding_edges, request)

    async def keep_alive(self) -> None:
        """Say every few seconds which generations live here, and give up those of the dead."""
        while True:
            try:
                await asyncio.to_thread(self._records.beat, sorted(self._drawing))
                given_up = await asyncio.to_thread(self._records.give_up_abandoned)
            except ToileError as error:  # the catalog is away; it may come back
                _log.warning("could not look after generations", reason=error.reason)
                given_up = 0
            if given_up:
                _log.warning("gave up abandoned generations", count=given_up)
            await asyncio.sleep(BEAT_INTERVAL_SECONDS)

    async def _plan(self, request: generate_pb2.GenerateRequest) -> Plan:
        plan = await asyncio.to_thread(self._records.plan, request)
        if plan.request.prompt or plan.pixels is None:
            return plan
        seen = await asyncio.to_thread(thumbnail, plan.pixels.image, SEEN_SIDE_PIXELS)
        caption = await self._models().describe(plan.base.artifact, seen)
        return await asyncio.to_thread(self._records.with_caption, plan, escape(caption))

    async def _own(
        self, take: Callable[P, tuple[str, bool]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[str, bool]:
        """Make a generation ours; if the client goes away meanwhile, it is not left running.

        `take` returns its name, and whether it is ours now.
        """
        taking = asyncio.ensure_future(asyncio.to_thread(take, *args, **kwargs))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            await asyncio.wait([taking])
            if taking.exception() is None:
                name, ours = taking.result()
                if ours:
                    await self._end(name, State.CANCELLED, None)
            raise

    async def _accepted(self, name: str) -> generate_pb2.GenerateResponse:
        position = await asyncio.to_thread(self._records.queue_position, name)
        return generate_pb2.GenerateResponse(
            accepted=generate_pb2.GenerationAccepted(generation=name, queue_position=position)
        )

    async def _draw(
        self, name: str, told: set[str], deadline: Deadline, *, new: bool
    ) -> AsyncGenerator[generate_pb2.GenerateResponse, None]:
        """Draw what is missing of a generation that is ours, and record how it ends.

        `told` are the images that the client knows.
        """
        self._drawing.add(name)
        ended = State.CANCELLED  # unless we get to know better
        failure: ToileError | None = None
        try:
            if new:
                yield await self._accepted(name)
            drawing = await asyncio.to_thread(self._records.load, name)
            for image in drawing.images:
                if image.name not in told:
                    yield _image_event(image)
            async with contextlib.aclosing(self._events(drawing, deadline)) as events:
                async for event in events:
                    yield event
            await _to_the_end(asyncio.to_thread(self._records.succeed, name))
            ended = State.SUCCEEDED
            yield _summary(await asyncio.to_thread(self._records.load, name))
        except DeadlineError:  # the client has gone away
            raise
        except Exception as error:
            ended = State.FAILED
            failure = to_error(error) or ToileError("internal error")
            raise
        finally:
            self._drawing.discard(name)
            if ended != State.SUCCEEDED:
                await self._end(name, ended, failure)

    async def _events(
        self, drawing: Drawing, deadline: Deadline
    ) -> AsyncGenerator[generate_pb2.GenerateResponse, None]:
        indices = drawing.missing
        if not indices:
            return
        start = await asyncio.to_thread(self._records.start, drawing)
        shown = await asyncio.to_thread(self._records.control_images, drawing)
        models, base = self._models(), drawing.base
        controls = await control_maps(models, base.artifact, drawing.controls, shown)
        wanted = drawing_of(
            drawing.request,
            base,
            drawing.adapters,
            controls,
            start,
            [drawing.prompts[index] for index in indices],
            [drawing.seeds[index] for index in indices],
        )
        drawn = models.diffuse(wanted, timeout_seconds=deadline.seconds_left())
        images = 0
        async with contextlib.aclosing(drawn) as events:
            async for event in events:
                images += event.HasField("image")
                yield await self._told(drawing, start, indices, event)
        if images < len(indices):
            raise ComputeUnavailableError("the models ended before all images were drawn")

    async def _told(
        self,
        drawing: Drawing,
        start: Start,
        indices: Sequence[int],
        event: inference_pb2.DiffuseResponse,
    ) -> generate_pb2.GenerateResponse:
        """Return what a client is told of an event of the models; an image is stored first."""
        if event.HasField("step"):
            step = event.step
            return generate_pb2.GenerateResponse(
                step=generate_pb2.StepProgress(
                    image_index=indices[step.image_index],
                    step=step.step,
                    total_steps=step.total_steps,
                )
            )
        if event.HasField("preview"):
            preview = event.preview
            return generate_pb2.GenerateResponse(
                preview=generate_pb2.Preview(
                    image_index=indices[preview.image_index], step=preview.step, jpeg=preview.jpeg
                )
            )
        index = indices[event.image.image_index]
        work = asyncio.to_thread(self._store, drawing, start, index, event.image.png)
        return _image_event(await _to_the_end(work))

    def _store(self, drawing: Drawing, start: Start, index: int, drawn: bytes) -> ImageRow:
        try:
            pixels = decode_png(drawn)
        except (OSError, ValueError, SyntaxError) as error:
            raise ComputeUnavailableError("the models sent a drawing that is no PNG") from error
        return self._records.add_image(drawing, index, start.finish(pixels))

    async def _end(self, name: str, state: State, error: ToileError | None) -> None:
        try:
            await _to_the_end(asyncio.to_thread(self._records.end, name, state, error))
        except ToileError as problem:
            # Its heart has stopped beating here, so it will be given up in a while.
            _log.warning("could not record an end", generation=name, reason=problem.reason)


async def _to_the_end(work: Awaitable[R]) -> R:
    """Wait for work that must not be left half way, also when the caller is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task])
        raise


def _image_event(image: ImageRow) -> generate_pb2.GenerateResponse:
    return generate_pb2.GenerateResponse(image=image_to_proto(image))


def _summary(drawing: Drawing) -> generate_pb2.GenerateResponse:
    return generate_pb2.GenerateResponse(
        generation=generation_to_proto(drawing.row, drawing.images)
    )
