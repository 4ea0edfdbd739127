"""What is wrong is told before anything is recorded or drawn."""

import asyncio
import time
from typing import Any

import pytest

from servers.generating import Painter, add_adapter, count, ended, generate, refused, stub
from servers.platform import MODEL_VERSION, PARENT, Platform
from toile.core.catalog.models import GenerationRow, ModelVersionRow
from toile.core.errors import DeadlineError, InvalidArgumentError
from toile.generate.deadline import Deadline
from toile.generate.handler import GenerateHandler
from toile.generate.records import GenerationRecords
from toile.v1 import generate_pb2

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.1, 1e9])
@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("guidance_scale", lambda value: {"guidance_scale": value}),
        ("guidance_rescale", lambda value: {"guidance_rescale": value}),
        ("refiner.strength", lambda value: {"refiner": {"strength": value}}),
        (
            "palette.strength",
            lambda value: {"palette": {"colours": ["red"], "strength": value}},
        ),
    ],
)
async def test_numbers_that_are_none(
    platform: Platform, painter: Painter, field: str, fields: Any, value: float
) -> None:
    error = await refused(platform, **fields(value))
    assert isinstance(error, InvalidArgumentError)
    assert error.metadata["field"] == field
    assert count(platform, GenerationRow) == 0
    assert not painter.requests


@pytest.mark.parametrize("weight", [NAN, INF, 10.5])
async def test_weights_that_are_none(platform: Platform, painter: Painter, weight: float) -> None:
    add_adapter(platform)
    error = await refused(platform, adapters=[{"model": MODEL_VERSION, "weight": weight}])
    assert error.metadata["field"] == "adapters.weight"
    assert not painter.requests


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"count": 0}, "INVALID_ARGUMENT", "count"),
        ({"count": 0, "seeds": [1]}, "INVALID_ARGUMENT", "seeds"),
        ({"count": -1}, "INVALID_ARGUMENT", "count"),
        ({"count": 10_000}, "INVALID_ARGUMENT", "count"),
        ({"steps": -1}, "INVALID_ARGUMENT", "steps"),
        ({"seed": 2**63 - 1}, "INVALID_ARGUMENT", "seed"),
        ({"preview_interval": -1}, "INVALID_ARGUMENT", "preview_interval"),
        ({"preview_interval": 151}, "INVALID_ARGUMENT", "preview_interval"),
        ({"repeat": 9}, "INVALID_ARGUMENT", "repeat"),
        ({"priority": 9}, "INVALID_ARGUMENT", "priority"),
        ({"output": {"format": 9}}, "INVALID_ARGUMENT", "output.format"),
        ({"refiner": {"mode": 9}}, "INVALID_ARGUMENT", "refiner.mode"),
        ({"scheduler": "Euler a"}, "UNKNOWN_SCHEDULER", "scheduler"),
        ({"palette": {}}, "INVALID_ARGUMENT", "palette.colours"),
        ({"palette": {"colours": ["red"] * 33}}, "INVALID_ARGUMENT", "palette.colours"),
        ({"palette": {"colours": ["reddish thing"]}}, "UNKNOWN_COLOUR", "palette.colours"),
        ({"prompt": "a __colour__ dress"}, "UNKNOWN_WILDCARD", "prompt"),
        ({"wildcards": {"a b": {"values": ["x"]}}}, "BAD_WILDCARD", "wildcards"),
        ({"wildcards": {"a": {}}}, "BAD_WILDCARD", "wildcards"),
        ({"prompt": "{ | }"}, "EMPTY_PROMPT", "prompt"),
        (
            {"prompt": "__a__", "wildcards": {"a": {"values": ["__a____a__"]}}},
            "EXPANSION_TOO_LONG",
            "prompt",
        ),
        ({"prompt": "(red:99) dress"}, "BAD_EMPHASIS", "prompt"),
        ({"prompt": "{red|(blue:99)} dress", "count": 20}, "BAD_EMPHASIS", "prompt"),
        ({"negative_prompt": "(red:99)"}, "BAD_EMPHASIS", "negative_prompt"),
        ({"prompt": "r " * 700}, "PROMPT_TOO_LONG", "prompt"),
        ({"adapters": [{"model": "x"}] * 5}, "TOO_MANY_ADAPTERS", "adapters"),
    ],
)
async def test_fields_that_cannot_be(
    platform: Platform, painter: Painter, fields: dict[str, Any], reason: str, field: str
) -> None:
    error = await refused(platform, **fields)
    assert (error.reason, error.metadata["field"]) == (reason, field)
    assert count(platform, GenerationRow) == 0
    assert not painter.requests


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({"count": 10_000}, "count must be 1 to 64, not 10000"),
        ({"count": 0}, "count must be 1 to 64, not 0"),
        ({"guidance_scale": NAN}, "guidance_scale must be 1 to 30, not nan"),
    ],
)
async def test_a_limit_is_told_with_its_field(
    platform: Platform, painter: Painter, fields: dict[str, Any], limits: str
) -> None:
    assert (await refused(platform, **fields)).message == limits


async def test_no_count_is_one_image(platform: Platform, painter: Painter) -> None:
    generation = (await generate(platform))[-1].generation
    assert (generation.request.count, len(generation.images)) == (1, 1)


def set_rank(platform: Platform, rank: int) -> None:
    with platform.catalog.transaction() as session:
        session.get_one(ModelVersionRow, MODEL_VERSION).config = {"rank": rank}


class TestRanks:
    @pytest.fixture
    def settings(self) -> dict[str, Any]:
        return {"engine": {"max_rank": 32}}

    async def test_what_no_engine_takes_is_refused(
        self, platform: Platform, painter: Painter
    ) -> None:
        add_adapter(platform)
        set_rank(platform, 40)
        error = await refused(platform, adapters=[{"model": MODEL_VERSION}])
        assert (error.reason, error.metadata["field"]) == ("RANK_TOO_HIGH", "adapters")
        assert (error.metadata["ranks"], error.metadata["limit"]) == ("40", "32")
        assert count(platform, GenerationRow) == 1, "the one that add_adapter makes"
        assert not painter.requests
        set_rank(platform, 32)
        assert await generate(platform, adapters=[{"model": MODEL_VERSION}])


def handler_of(platform: Platform) -> GenerateHandler:
    def unused(*_: Any) -> Any:
        pytest.fail("nothing may be asked of the models")

    records = GenerationRecords(platform.settings, platform.catalog, platform.store, unused)
    return GenerateHandler(records, unused)


async def test_after_the_deadline_nothing_is_begun(platform: Platform, painter: Painter) -> None:
    request = generate_pb2.GenerateRequest(parent=PARENT, prompt="a dress")
    with pytest.raises(DeadlineError):
        await anext(handler_of(platform).generate(request, Deadline(0.0)))
    assert count(platform, GenerationRow) == 0


async def test_the_models_are_told_how_long_somebody_waits(
    platform: Platform, painter: Painter
) -> None:
    request = generate_pb2.GenerateRequest(parent=PARENT, prompt="a dress")
    async for _ in stub(platform).Generate(request, timeout=30):
        pass
    assert 20 < painter.requests[0].timeout_seconds <= 30


async def test_a_client_that_leaves_while_it_is_recorded_leaves_nothing_running(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, real = asyncio.Event(), GenerationRecords.add
    loop = asyncio.get_running_loop()

    def slowly(*arguments: Any) -> tuple[str, bool]:
        loop.call_soon_threadsafe(entered.set)
        added = real(*arguments)
        time.sleep(0.3)
        return added

    monkeypatch.setattr(GenerationRecords, "add", slowly)
    call = asyncio.create_task(generate(platform))
    await entered.wait()
    await asyncio.sleep(0.1)
    call.cancel()
    generation = await ended(platform)
    assert generation.state == generate_pb2.GENERATION_STATE_CANCELLED
    assert not painter.requests
