"""What becomes of work whose models are lost."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from PIL import Image

from servers.inference import FakeModels, running_models
from toile.core import inference
from toile.core.errors import (
    ComputeUnavailableError,
    DeadlineError,
    ExhaustedError,
    InvalidArgumentError,
)
from toile.core.inference import Inference
from toile.core.settings import Settings
from toile.v1 import inference_pb2


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "PAUSES_SECONDS", (0.01, 0.01, 0.01))


@pytest.fixture
async def served() -> AsyncIterator[tuple[FakeModels, Inference]]:
    async with running_models() as (models, address):
        models.painter = draw
        async with Inference.connect(Settings(inference_address=address)) as client:
            yield models, client


async def draw(
    request: inference_pb2.DiffuseRequest, context: Any
) -> AsyncIterator[inference_pb2.DiffuseResponse]:
    for index, seed in enumerate(request.seeds):
        yield inference_pb2.DiffuseResponse(step={"image_index": index, "step": 1})
        yield inference_pb2.DiffuseResponse(image={"image_index": index, "png": bytes([seed])})


async def drawn(client: Inference, timeout_seconds: float | None = None) -> list[tuple[int, bytes]]:
    request = inference_pb2.DiffuseRequest(seeds=[7, 8, 9])
    events = client.diffuse(request, timeout_seconds=timeout_seconds)
    return [(e.image.image_index, e.image.png) async for e in events if e.HasField("image")]


Served = tuple[FakeModels, Inference]
ALL = [(0, b"\x07"), (1, b"\x08"), (2, b"\x09")]


async def test_a_drawing_lost_before_its_first_event_is_drawn_by_others(served: Served) -> None:
    models, client = served
    models.losses["Diffuse"] = 3
    assert await drawn(client) == ALL
    assert models.calls["Diffuse"] == 4


async def test_a_drawing_lost_in_the_middle_goes_on_with_what_is_missing(served: Served) -> None:
    models, client = served

    async def killed_after_one(request: Any, context: Any) -> Any:
        events = draw(request, context)
        for _ in range(3):
            yield await anext(events)
        models.painter = draw
        await context.abort(grpc.StatusCode.UNAVAILABLE, "The actor died unexpectedly")

    models.painter = killed_after_one
    assert await drawn(client) == ALL
    assert [list(request.seeds) for request in models.requests] == [[7, 8, 9], [8, 9]]


async def test_what_is_missing_keeps_its_prompts(served: Served) -> None:
    models, client = served

    async def killed_after_one(request: Any, context: Any) -> Any:
        events = draw(request, context)
        for _ in range(3):
            yield await anext(events)
        models.painter = draw
        await context.abort(grpc.StatusCode.UNAVAILABLE, "The actor died unexpectedly")

    models.painter = killed_after_one
    wanted = inference_pb2.DiffuseRequest(seeds=[7, 8, 9], prompts=["red", "blue", "green"])
    async for _ in client.diffuse(wanted):
        pass
    assert [list(request.prompts) for request in models.requests] == [
        ["red", "blue", "green"],
        ["blue", "green"],
    ]


async def test_a_drawing_that_was_let_in_waits_where_the_queue_is_full_now(served: Served) -> None:
    models, client = served
    models.errors["Diffuse"] = ExhaustedError("the queue is full")
    with pytest.raises(ExhaustedError):
        await drawn(client)
    assert models.calls["Diffuse"] == 1
    models.losses["Diffuse"] = 1
    with pytest.raises(ExhaustedError):
        await drawn(client)
    assert models.calls["Diffuse"] == 1 + 4


async def test_models_that_stay_away_are_given_up(served: Served) -> None:
    models, client = served
    models.losses["Diffuse"] = 100
    with pytest.raises(ComputeUnavailableError):
        await drawn(client)
    assert models.calls["Diffuse"] == 4


async def test_what_the_models_say_themselves_is_not_asked_again(served: Served) -> None:
    models, client = served
    models.errors["Diffuse"] = InvalidArgumentError("no")
    with pytest.raises(InvalidArgumentError):
        await drawn(client)
    assert models.calls["Diffuse"] == 1


async def test_a_deadline_ends_the_wait_for_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "PAUSES_SECONDS", (1000.0,))
    models, client = served
    models.losses["Diffuse"] = 1
    with pytest.raises(DeadlineError):
        await drawn(client, timeout_seconds=0.2)
    assert models.calls["Diffuse"] == 1


async def test_a_cancellation_ends_the_wait_for_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "PAUSES_SECONDS", (1000.0,))
    models, client = served
    models.losses["Diffuse"] = 1
    drawing = asyncio.create_task(drawn(client))
    await models.drawing.wait()
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing


async def test_a_cancellation_that_grpc_keeps_to_itself_ends_the_drawing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where the models are lost while it still opens the call (`_prepare_rpc`)."""
    opening = asyncio.Event()

    class Opening:
        async def __aiter__(self) -> AsyncIterator[inference_pb2.DiffuseResponse]:
            opening.set()
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                nothing = grpc.aio.Metadata()
                unavailable = grpc.StatusCode.UNAVAILABLE
                raise grpc.aio.AioRpcError(unavailable, nothing, nothing, "lost") from None
            yield inference_pb2.DiffuseResponse()

        def cancel(self) -> None:
            pass

    monkeypatch.setattr(inference, "PAUSES_SECONDS", (1000.0,))
    _, client = served
    monkeypatch.setattr(client._stub, "Diffuse", lambda *_, **__: Opening())
    drawing = asyncio.create_task(drawn(client))
    await opening.wait()
    drawing.cancel()
    done, _ = await asyncio.wait([drawing], timeout=10)
    assert done
    assert drawing.cancelled()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


UNARY: dict[str, Callable[[Inference], Awaitable[Any]]] = {
    "EmbedImages": lambda client: client.embed_images("base", [picture()]),
    "EmbedTexts": lambda client: client.embed_texts("base", ["a red dress"]),
    "SegmentImage": lambda client: client.segment("base", picture()),
    "DescribeImage": lambda client: client.describe("base", picture()),
}


@pytest.mark.parametrize("method", UNARY)
async def test_a_lost_replica_costs_a_unary_call_a_repetition(served: Served, method: str) -> None:
    models, client = served
    models.losses[method] = 2
    assert await UNARY[method](client)
    assert models.calls[method] == 3
    models.losses[method] = 100
    with pytest.raises(ComputeUnavailableError):
        await UNARY[method](client)
    assert models.calls[method] == 3 + 4


async def test_models_that_hang_are_unavailable(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "UNARY_TIMEOUT_SECONDS", 0.2)
    models, client = served

    async def hang(*_: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(models, "_begin", hang)
    with pytest.raises(ComputeUnavailableError):
        await client.describe("base", picture())
