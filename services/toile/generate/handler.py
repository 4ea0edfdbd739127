"""What Generate does: record, draw, store, tell; and what becomes of it when it is cut short."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeAlias, TypeVar

import structlog

from toile.core.catalog.models import ImageRow
from toile.core.errors import ToileError
from toile.core.images import image_to_proto
from toile.core.inference import Inference
from toile.core.rpc.mapping import to_error
from toile.generate.convert import drawing_of, generation_to_proto
from toile.generate.records import Drawing, GenerationRecords, State
from toile.v1 import generate_pb2

FOLLOW_INTERVAL_SECONDS = 0.5
BEAT_INTERVAL_SECONDS = 5.0

Models: TypeAlias = Callable[[], Inference]
"""Gives the client of the models, which is opened in the loop that uses it."""

R = TypeVar("R")

_log = structlog.stdlib.get_logger(__name__)


class GenerateHandler:
    """Draws generations. Each has one owner at a time, whose heartbeat the catalog holds."""

    def __init__(self, records: GenerationRecords, models: Models) -> None:
        self._records = records
        self._models = models
        self._drawing: set[str] = set()

    async def generate(
        self, request: generate_pb2.GenerateRequest
    ) -> AsyncGenerator[generate_pb2.GenerateResponse, None]:
        """Yield the events of a generation.

        A request id that was sent before gets the same generation: a finished one is replayed,
        one that is being drawn is followed, one that ended early goes on with what is missing.

        Raises:
            ToileError: The request is wrong, or what is behind does not answer.
        """
        name, new = await asyncio.to_thread(self._records.accept, request)
        yield generate_pb2.GenerateResponse(
            accepted=generate_pb2.GenerationAccepted(generation=name)
        )
        told: set[str] = set()
        while not new:
            drawing = await asyncio.to_thread(self._records.load, name)
            for image in drawing.images:
                if image.name not in told:
                    told.add(image.name)
                    yield _image_event(image)
            if drawing.row.state == State.SUCCEEDED:
                yield _summary(drawing)
                return
            new = await asyncio.to_thread(self._records.claim, name)
            if not new:
                await asyncio.sleep(FOLLOW_INTERVAL_SECONDS)
        async with contextlib.aclosing(self._draw(name, told)) as events:
            async for event in events:
                yield event

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

    async def _draw(
        self, name: str, told: set[str]
    ) -> AsyncGenerator[generate_pb2.GenerateResponse, None]:
        """Draw what is missing of a generation that is ours, and record how it ends."""
        self._drawing.add(name)
        ended = State.CANCELLED  # unless we get to know better
        failure: ToileError | None = None
        try:
            drawing = await asyncio.to_thread(self._records.load, name)
            for image in drawing.images:
                if image.name not in told:
                    yield _image_event(image)
            if drawing.missing:
                async with contextlib.aclosing(self._events(drawing)) as events:
                    async for event in events:
                        yield event
            await _to_the_end(asyncio.to_thread(self._records.succeed, name))
            ended = State.SUCCEEDED
            yield _summary(await asyncio.to_thread(self._records.load, name))
        except Exception as error:
            ended = State.FAILED
            failure = to_error(error) or ToileError("internal error")
            raise
        finally:
            self._drawing.discard(name)
            if ended != State.SUCCEEDED:
                await self._end(name, ended, failure)

    async def _events(
        self, drawing: Drawing
    ) -> AsyncGenerator[generate_pb2.GenerateResponse, None]:
        indices = drawing.missing
        wanted = drawing_of(drawing.request, drawing.base, drawing.adapters, indices)
        async with contextlib.aclosing(self._models().diffuse(wanted)) as drawn:
            async for event in drawn:
                if event.HasField("step"):
                    yield generate_pb2.GenerateResponse(
                        step=generate_pb2.StepProgress(
                            image_index=indices[event.step.image_index],
                            step=event.step.step,
                            total_steps=event.step.total_steps,
                        )
                    )
                else:
                    index = indices[event.image.image_index]
                    work = asyncio.to_thread(
                        self._records.add_image, drawing, index, event.image.png
                    )
                    yield _image_event(await _to_the_end(work))

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
