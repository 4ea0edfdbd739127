"""A file of prompts over gRPC."""

import asyncio
import json
from collections import defaultdict
from typing import Any

import grpc
import pytest

from servers.generating import Painter, count, stub
from servers.platform import PARENT, Platform
from toile.core.catalog.models import GenerationRow, ImageRow
from toile.core.errors import (
    ComputeUnavailableError,
    ExhaustedError,
    FailedPreconditionError,
    StoreUnavailableError,
    ToileError,
)
from toile.core.rpc.mapping import from_rpc_error
from toile.generate import batch, records
from toile.generate.batch import ROWS_IN_FLIGHT
from toile.v1 import common_pb2, generate_pb2


def call(platform: Platform, rows: list[Any], timeout: float | None = None, **defaults: Any) -> Any:
    request = generate_pb2.GenerateBatchRequest(
        file=json.dumps(rows).encode(),
        format=generate_pb2.PROMPT_FILE_FORMAT_JSON,
        defaults={"parent": PARENT, "seed": 7, "request_id": "batch", **defaults},
    )
    return stub(platform).GenerateBatch(request, timeout=timeout)


async def draw(platform: Platform, rows: list[Any], **defaults: Any) -> dict[int, list[Any]]:
    told: dict[int, list[Any]] = defaultdict(list)
    async for response in call(platform, rows, **defaults):
        outcome = str(response.WhichOneof("outcome"))
        told[response.row].append(getattr(response, outcome))
    return dict(told)


async def test_every_row_tells_its_own_story(platform: Platform, painter: Painter) -> None:
    rows: list[Any] = ["a red dress", {"prompt": "a blue dress", "count": 2}]
    told = await draw(platform, rows)
    assert sorted(told) == [0, 1]
    assert [len(told[row][-1].generation.images) for row in (0, 1)] == [1, 2]
    assert [told[row][-1].generation.request.prompt for row in (0, 1)] == [
        "a red dress",
        "a blue dress",
    ]
    assert {request.priority for request in painter.requests} == {common_pb2.PRIORITY_BATCH}


async def test_a_bad_row_does_not_stop_the_others(platform: Platform, painter: Painter) -> None:
    rows: list[Any] = [
        "a dress",
        {"prompt": "a dress", "stepz": 3},
        {"prompt": "a dress", "width": 130},
        {"prompt": "a nude woman"},
        "a coat",
    ]
    told = await draw(platform, rows)
    errors = {row: events[-1] for row, events in told.items() if row in (1, 2, 3)}
    assert {row: error.reason for row, error in errors.items()} == {
        1: "BAD_ROW",
        2: "BAD_SIZE",
        3: "RESTRICTED_CONTENT",
    }
    assert "row 1" in errors[1].message
    assert "stepz" in errors[1].message
    assert errors[2].message.startswith("row 2, width: ")
    assert told[0][-1].HasField("generation")
    assert told[4][-1].HasField("generation")
    assert count(platform, GenerationRow) == 2


async def test_the_same_batch_resumes(platform: Platform, painter: Painter) -> None:
    rows = [f"dress {number}" for number in range(6)]
    painter.fail_after = (1, FailedPreconditionError("the base lacks a part"))
    first = await draw(platform, rows, count=2)
    assert all(events[-1].reason == "FAILED_PRECONDITION" for events in first.values())
    assert count(platform, ImageRow) == 6
    painter.fail_after = None
    again = await draw(platform, rows, count=2)
    assert all(len(events[-1].generation.images) == 2 for events in again.values())
    assert count(platform, GenerationRow) == 6
    assert [list(request.seeds) for request in painter.requests[6:]] == [[8]] * 6
    drawn = len(painter.requests)
    replayed = await draw(platform, rows, count=2)
    assert {row: events[-1] for row, events in replayed.items()} == {
        row: events[-1] for row, events in again.items()
    }
    assert len(painter.requests) == drawn


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses."""
    monkeypatch.setattr(batch, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(batch, "LONGEST_PAUSE_SECONDS", 0.02)


@pytest.mark.parametrize(
    "error", [ExhaustedError("the queue is full"), ComputeUnavailableError("nobody is there")]
)
@pytest.mark.usefixtures("quick")
async def test_rows_wait_for_what_passes(
    platform: Platform, painter: Painter, error: ToileError
) -> None:
    """Each row fails twice, the second time after an image; nothing is told twice."""
    failures = {f"dress {number}": [(1, error), (0, error)] for number in range(6)}

    async def failing(request: Any, context: Any) -> Any:
        painter.fail_after = failures[request.prompt].pop() if failures[request.prompt] else None
        async for event in painter.draw(request, context):
            yield event

    platform.models.painter = failing
    told = await draw(platform, list(failures), count=2, request_id="")
    for events in told.values():
        kinds = [event.WhichOneof("event") for event in events]
        assert [kind for kind in kinds if kind != "step"] == [
            "accepted",
            "image",
            "image",
            "generation",
        ]
        assert len(events[-1].generation.images) == 2
    assert count(platform, GenerationRow) == 6
    assert count(platform, ImageRow) == 12


@pytest.mark.usefixtures("quick")
async def test_rows_wait_for_the_store(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, away = records.put_image, [StoreUnavailableError("the store is away")]

    def put(*args: Any, **fields: Any) -> Any:
        if away:
            raise away.pop()
        return real(*args, **fields)

    monkeypatch.setattr(records, "put_image", put)
    told = await draw(platform, ["a dress"])
    assert told[0][-1].HasField("generation")


@pytest.mark.usefixtures("quick")
async def test_what_stays_away_is_given_up_and_a_full_queue_is_not(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PATIENCE_SECONDS", 0.05)
    painter.fail_after = (0, ComputeUnavailableError("nobody is there"))
    told = await draw(platform, ["a dress"])
    assert told[0][-1].reason == "COMPUTE_UNAVAILABLE"
    painter.fail_after = (0, ExhaustedError("the queue is full"))
    tried = len(painter.requests)
    ends: set[str] = set()
    try:
        async for response in call(platform, ["a dress"], request_id="other", timeout=2):
            if response.HasField("error"):
                ends.add(response.error.reason)
    except grpc.aio.AioRpcError as error:  # the client may notice before the row does, or after
        ends.add(error.code().name)
    assert ends == {"DEADLINE_EXCEEDED"}
    assert len(painter.requests) - tried > 5


async def test_only_a_few_rows_are_drawn_at_once(platform: Platform, painter: Painter) -> None:
    painter.pause_after = 0
    running = asyncio.create_task(draw(platform, ["a dress"] * 20))
    await painter.begun.wait()
    await asyncio.sleep(0.5)
    assert len(painter.requests) == ROWS_IN_FLIGHT
    painter.go_on.set()
    assert len(await running) == 20


async def test_a_client_that_leaves_ends_the_batch(platform: Platform, painter: Painter) -> None:
    painter.pause_after = 0
    stream = call(platform, ["a dress"] * 20)
    await stream.read()
    await painter.begun.wait()
    stream.cancel()
    await asyncio.wait_for(painter.cancelled.wait(), 10)
    await asyncio.sleep(0.3)
    assert len(painter.requests) <= ROWS_IN_FLIGHT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": b"not json"}, "BAD_PROMPT_FILE"),
        ({"file": b"[]"}, "NO_ROWS"),
        ({"format": generate_pb2.PROMPT_FILE_FORMAT_UNSPECIFIED}, "INVALID_ARGUMENT"),
        ({"defaults": {"parent": "studio"}}, "BAD_RESOURCE_NAME"),
    ],
)
async def test_a_file_that_cannot_be_read_draws_nothing(
    platform: Platform, painter: Painter, change: dict[str, Any], reason: str
) -> None:
    fields = {
        "file": b'["a dress"]',
        "format": generate_pb2.PROMPT_FILE_FORMAT_JSON,
        "defaults": {"parent": PARENT},
        **change,
    }
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stub(platform).GenerateBatch(generate_pb2.GenerateBatchRequest(**fields)):
            pass
    assert from_rpc_error(caught.value).reason == reason
    assert count(platform, GenerationRow) == 0
    assert not painter.requests
