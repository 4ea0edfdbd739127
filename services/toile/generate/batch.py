"""Drawing the rows of a file of prompts, a few at a time."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable

import tenacity

from toile.core.context import new_id
from toile.core.errors import (
    CatalogUnavailableError,
    ComputeUnavailableError,
    ExhaustedError,
    StoreUnavailableError,
    ToileError,
)
from toile.core.names import ProjectName
from toile.core.rpc.mapping import to_error
from toile.generate.batch_file import BadRow, read_rows
from toile.generate.deadline import Deadline
from toile.generate.handler import GenerateHandler
from toile.v1 import generate_pb2

ROWS_IN_FLIGHT = 4
"""Rows drawn at once: enough to keep the models busy while images are stored."""
EVENTS_AHEAD = 16
"""Events that may wait for a slow client before rows wait for it too."""

FULL = ExhaustedError.default_reason
AWAY = tuple(
    kind.default_reason
    for kind in (ComputeUnavailableError, StoreUnavailableError, CatalogUnavailableError)
)
"""Reasons of failures that pass: a row is tried again where others have the place it needs, or
what is behind the service is away."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0
"""Most of the first pause and of any; how long one is is drawn by lot."""
PATIENCE_SECONDS = 120.0
"""Pauses of a row in all until what is away is given up."""


async def draw_batch(
    handler: GenerateHandler,
    request: generate_pb2.GenerateBatchRequest,
    deadline: Deadline,
) -> AsyncGenerator[generate_pb2.GenerateBatchResponse, None]:
    """Yield the events of all rows. A row that fails ends with an error; the others go on.

    A full queue is waited for until the deadline, and what is away for `PATIENCE_SECONDS`.

    Sending the same file with the same request id again resumes it: rows that are done are
    replayed, the others drawn.

    Raises:
        InvalidArgumentError: The file as a whole is wrong; nothing is drawn.
    """
    deadline.seconds_left()
    ProjectName.parse(request.defaults.parent, "defaults.parent")
    rows = await asyncio.to_thread(read_rows, request)
    waiting = iter(list(enumerate(rows)))
    told: asyncio.Queue[generate_pb2.GenerateBatchResponse | None] = asyncio.Queue(EVENTS_AHEAD)
    workers = [
        asyncio.create_task(_draw_rows(handler, waiting, told, deadline))
        for _ in range(min(ROWS_IN_FLIGHT, len(rows)))
    ]
    try:
        running = len(workers)
        while running:
            event = await told.get()
            if event is None:
                running -= 1
            else:
                yield event
        await asyncio.gather(*workers)  # a bug of ours is not a row's
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _draw_rows(
    handler: GenerateHandler,
    waiting: Iterable[tuple[int, generate_pb2.GenerateRequest | BadRow]],
    told: asyncio.Queue[generate_pb2.GenerateBatchResponse | None],
    deadline: Deadline,
) -> None:
    """Draw one row after the other until none waits; None tells that there are no more."""
    try:
        for number, row in waiting:
            await _draw_row(handler, number, row, told, deadline)
    except Exception:
        await told.put(None)
        raise
    await told.put(None)


async def _draw_row(
    handler: GenerateHandler,
    number: int,
    row: generate_pb2.GenerateRequest | BadRow,
    told: asyncio.Queue[generate_pb2.GenerateBatchResponse | None],
    deadline: Deadline,
) -> None:
    if isinstance(row, BadRow):
        await told.put(_failed(number, "BAD_ROW", row.message))
        return
    row.request_id = row.request_id or new_id()  # so that trying again is the same generation
    known: set[str] = set()
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS),
        stop=_given_up,
        reraise=True,
    )

    async def draw() -> None:
        async with contextlib.aclosing(handler.generate(row, deadline)) as events:
            async for event in events:
                name = event.accepted.generation or event.image.name
                if name in known:  # told before it was tried again
                    continue
                if name:
                    known.add(name)
                await told.put(generate_pb2.GenerateBatchResponse(row=number, event=event))

    try:
        await retrying(draw)
    except Exception as error:
        typed = to_error(error)
        if typed is None:
            raise
        await told.put(_failed(number, typed.reason, _message(number, typed)))


def _may_pass(error: BaseException) -> bool:
    typed = to_error(error)
    return typed is not None and typed.reason in (FULL, *AWAY)


def _given_up(state: tenacity.RetryCallState) -> bool:
    """Whether a row has waited too long; one for a place in a queue ends with the call alone."""
    error = state.outcome.exception() if state.outcome else None
    typed = to_error(error) if error else None
    waits = typed is not None and typed.reason == FULL
    return not waits and state.idle_for >= PATIENCE_SECONDS


def _message(number: int, error: ToileError) -> str:
    field = error.metadata.get("field", "")
    where = f"row {number}, {field}" if field else f"row {number}"
    return f"{where}: {error.message}"


def _failed(row: int, reason: str, message: str) -> generate_pb2.GenerateBatchResponse:
    return generate_pb2.GenerateBatchResponse(
        row=row, error=generate_pb2.BatchRowError(reason=reason, message=message)
    )
