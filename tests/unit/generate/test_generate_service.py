import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from PIL import Image
from sqlalchemy import select

from servers.generating import (
    Painter,
    add_adapter,
    call,
    count,
    download,
    ended,
    generate,
    kinds,
    only_generation,
    refused,
    stub,
    upload,
)
from servers.platform import DATASET, MODEL_VERSION, PARENT, Platform, png
from toile.core.catalog.models import GenerationRow, ImageRow
from toile.core.clock import now
from toile.core.errors import (
    BadImageError,
    CancelledError,
    ComputeUnavailableError,
    DiskFullError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RequestReusedError,
    StoreUnavailableError,
    ToileError,
)
from toile.core.rpc.mapping import from_rpc_error
from toile.generate import records
from toile.imaging import png as png_files
from toile.v1 import generate_pb2, inference_pb2

FAILED = generate_pb2.GENERATION_STATE_FAILED
CANCELLED = generate_pb2.GENERATION_STATE_CANCELLED
SUCCEEDED = generate_pb2.GENERATION_STATE_SUCCEEDED


async def test_events_tell_the_story_in_order(platform: Platform, painter: Painter) -> None:
    events = await generate(platform, count=2)

    assert kinds(events) == ["accepted", "step", "image", "step", "image", "generation"]
    assert [e.step.image_index for e in events if e.HasField("step")] == [0, 1]
    generation = events[-1].generation
    assert generation.name == events[0].accepted.generation
    assert generation.state == SUCCEEDED
    assert list(generation.images) == [e.image for e in events if e.HasField("image")]
    assert [image.seed for image in generation.images] == [7, 8]
    read = stub(platform).GetGeneration(generate_pb2.GetGenerationRequest(name=generation.name))
    assert (await read).generation == generation


async def test_defaults_are_filled_in_and_asked_of_the_models(
    platform: Platform, painter: Painter
) -> None:
    resolved = (await generate(platform, refiner={}))[-1].generation.request

    assert (resolved.steps, resolved.guidance_scale, resolved.count) == (20, 3, 1)
    assert (resolved.width, resolved.height) == (128, 128)
    assert resolved.base == "bases/tiny"
    assert resolved.scheduler == "EulerDiscreteScheduler"
    asked = painter.requests[0]
    assert asked.base_artifact == "bases/tiny/0123"
    assert asked.refiner_strength == pytest.approx(0.2)
    assert (asked.steps, asked.width, asked.height) == (20, 128, 128)

    other = (await generate(platform, base="bases/other"))[-1].generation.request
    assert other.guidance_scale == 5


async def test_a_random_seed_is_recorded(platform: Platform, painter: Painter) -> None:
    request = generate_pb2.GenerateRequest(parent=PARENT, prompt="a dress", count=2)
    events = [event async for event in stub(platform).Generate(request)]
    seeds = [event.image.seed for event in events if event.HasField("image")]
    assert seeds[1] == seeds[0] + 1
    assert list(painter.requests[0].seeds) == seeds


async def test_an_adapter_may_change_its_strength(platform: Platform, painter: Painter) -> None:
    add_adapter(platform)
    schedule = [{"share": 0.2, "weight": 0.0}, {"share": 0.6, "weight": 1.5}]
    adapters = [{"model": MODEL_VERSION, "schedule": schedule}]
    resolved = (await generate(platform, adapters=adapters))[-1].generation.request
    for adapter in (painter.requests[0].adapters[0], resolved.adapters[0]):
        assert [(p.share, p.weight) for p in adapter.schedule] == [(0.2, 0.0), (0.6, 1.5)]
    again = [MessageToDict(adapter) for adapter in resolved.adapters]  # a resolved one is valid
    await generate(platform, adapters=again)
    assert painter.requests[1].adapters == painter.requests[0].adapters


async def test_the_file_says_how_it_was_made(platform: Platform, painter: Painter) -> None:
    add_adapter(platform)
    adapter = {"model": MODEL_VERSION, "weight": 0.5}
    events = await generate(platform, count=2, negative_prompt="blurry", adapters=[adapter])
    image = [event.image for event in events if event.HasField("image")][1]

    data = await download(platform, image.name)
    said = png_files.read(data)

    assert len(data) == image.size_bytes
    assert said.parameters is not None
    assert (said.parameters.prompt, said.parameters.seed) == ("a red dress", 8)
    assert said.parameters.negative_prompt == "blurry"
    assert said.toile is not None
    assert said.toile["image"] == image.name
    assert said.toile["adapters"][0]["model_version"] == MODEL_VERSION
    assert said.toile["adapters"][0]["weight"] == 0.5
    assert np.asarray(Image.open(io.BytesIO(data))).mean() == 8


async def test_an_adapter_may_be_named_by_its_model(platform: Platform, painter: Painter) -> None:
    add_adapter(platform)
    model = MODEL_VERSION.removesuffix("/versions/1")
    resolved = (await generate(platform, adapters=[{"model": model}]))[-1].generation.request
    assert [(a.model, a.weight) for a in resolved.adapters] == [(MODEL_VERSION, 1.0)]
    assert painter.requests[0].adapters[0].artifact == "projects/studio/models/lace/versions/1/job"


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"prompt": " "}, InvalidArgumentError, "EMPTY_PROMPT"),
        ({"prompt": "x" * 10_000}, InvalidArgumentError, "PROMPT_TOO_LONG"),
        ({"prompt": "r " * 700}, InvalidArgumentError, "PROMPT_TOO_LONG"),
        ({"negative_prompt": "r " * 700}, InvalidArgumentError, "PROMPT_TOO_LONG"),
        ({"width": 130}, InvalidArgumentError, "BAD_SIZE"),
        ({"height": 8}, InvalidArgumentError, "BAD_SIZE"),
        ({"width": 4096}, InvalidArgumentError, "BAD_SIZE"),
        ({"width": -8}, InvalidArgumentError, "BAD_SIZE"),
        ({"count": 65}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"count": -1}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"steps": 151}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"seed": -1}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"guidance_scale": float("nan")}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"guidance_scale": 0.5}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"scheduler": "Euler a"}, InvalidArgumentError, "UNKNOWN_SCHEDULER"),
        ({"refiner": {"strength": 0.9}}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"refiner": {"strength": 0.2}, "steps": 4}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"refiner": {}, "base": "bases/other"}, FailedPreconditionError, "NO_REFINER"),
        ({"base": "bases/none"}, NotFoundError, "NOT_FOUND"),
        ({"base": "sdxl"}, InvalidArgumentError, "BAD_RESOURCE_NAME"),
        ({"parent": "studio"}, InvalidArgumentError, "BAD_RESOURCE_NAME"),
        ({"adapters": [{"model": f"{PARENT}/models/x"}]}, NotFoundError, "ADAPTER_NOT_FOUND"),
        ({"adapters": [{"model": "x"}]}, InvalidArgumentError, "BAD_RESOURCE_NAME"),
        ({"adapters": [{"model": "x"}] * 5}, InvalidArgumentError, "TOO_MANY_ADAPTERS"),
    ],
)
async def test_mistakes_are_named_before_anything_is_recorded(
    platform: Platform, painter: Painter, fields: dict[str, Any], kind: type, reason: str
) -> None:
    error = await refused(platform, **fields)
    assert isinstance(error, kind)
    assert error.reason == reason
    assert error.message
    assert count(platform, GenerationRow) == 0
    assert not painter.requests


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": "bases/other"}, "ADAPTER_MISMATCH"),
        ({"parent": "projects/rival"}, "ADAPTER_NOT_FOUND"),
        ({"adapters": [{"model": MODEL_VERSION}] * 2}, "DUPLICATE_ADAPTER"),
        (
            {"adapters": [{"model": MODEL_VERSION, "weight": float("inf")}]},
            "INVALID_ARGUMENT",
        ),
        *(
            (
                {
                    "adapters": [
                        {
                            "model": MODEL_VERSION,
                            "schedule": [{"share": s, "weight": w} for s, w in points],
                            **more,
                        }
                    ]
                },
                "INVALID_ARGUMENT",
            )
            for points, more in (
                ([(0.0, 1.0), (1.0, 0.0)], {"weight": 1.0}),
                ([(0.5, 1.0), (0.5, 0.0)], {}),
                ([(0.5, 1.0), (0.2, 0.0)], {}),
                ([(0.0, 1.0), (1.1, 0.0)], {}),
                ([(0.0, float("nan"))], {}),
                ([(i / 20, 1.0) for i in range(17)], {}),
            )
        ),
    ],
)
async def test_adapters_that_cannot_be_used(
    platform: Platform, painter: Painter, change: dict[str, Any], reason: str
) -> None:
    add_adapter(platform)
    fields = {"adapters": [{"model": MODEL_VERSION}], **change}
    assert (await refused(platform, **fields)).reason == reason
    assert not painter.requests


async def test_the_same_request_is_replayed(platform: Platform, painter: Painter) -> None:
    first = await generate(platform, count=2, request_id="one")
    again = await generate(platform, count=2, request_id="one")

    assert kinds(again) == ["accepted", "image", "image", "generation"]
    assert again[-1] == first[-1]
    assert len(painter.requests) == 1
    assert count(platform, ImageRow) == 2
    assert isinstance(await refused(platform, count=3, request_id="one"), RequestReusedError)


async def test_a_running_request_is_followed(platform: Platform, painter: Painter) -> None:
    painter.pause_after = 1
    first = asyncio.create_task(generate(platform, count=2, request_id="one"))
    await painter.begun.wait()
    second = asyncio.create_task(generate(platform, count=2, request_id="one"))
    await asyncio.sleep(0.2)
    painter.go_on.set()

    events, followed = await asyncio.gather(first, second)
    assert [e.image for e in followed if e.HasField("image")] == list(events[-1].generation.images)
    assert followed[-1] == events[-1]
    assert len(painter.requests) == 1


async def test_what_failed_goes_on_with_what_is_missing(
    platform: Platform, painter: Painter
) -> None:
    painter.fail_after = (1, ComputeUnavailableError("the models do not answer"))
    error = await refused(platform, count=3, request_id="one")
    assert isinstance(error, ComputeUnavailableError)
    failed = await ended(platform)
    assert failed.state == FAILED
    assert [image.seed for image in failed.images] == [7]

    painter.fail_after = None
    events = await generate(platform, count=3, request_id="one")
    assert events[-1].generation.state == SUCCEEDED
    assert [e.image.seed for e in events if e.HasField("image")] == [7, 8, 9]
    assert [e.step.image_index for e in events if e.HasField("step")] == [1, 2]
    assert list(painter.requests[1].seeds) == [8, 9]
    assert events[-1].generation.images[0] == failed.images[0]


async def test_a_client_that_leaves_cancels_and_keeps_what_it_was_told(
    platform: Platform, painter: Painter
) -> None:
    painter.pause_after = 1
    stream = call(platform, count=3, request_id="one")
    told = None
    async for event in stream:
        if event.HasField("image"):
            told = event.image
            break
    stream.cancel()

    await asyncio.wait_for(painter.cancelled.wait(), 10)
    generation = await ended(platform)
    assert generation.state == CANCELLED
    assert generation.HasField("end_time")
    assert list(generation.images) == [told]
    assert await download(platform, generation.images[0].name)

    painter.pause_after = None
    events = await generate(platform, count=3, request_id="one")
    assert [image.seed for image in events[-1].generation.images] == [7, 8, 9]


async def test_a_deadline_cancels(platform: Platform, painter: Painter) -> None:
    painter.pause_after = 0
    request = generate_pb2.GenerateRequest(parent=PARENT, prompt="a dress")
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stub(platform).Generate(request, timeout=0.5):
            pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await ended(platform)).state == CANCELLED


@pytest.mark.parametrize(
    "error", [DiskFullError("no space is left"), StoreUnavailableError("the store is away")]
)
async def test_an_image_that_cannot_be_stored_is_not_told(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch, error: ToileError
) -> None:
    calls = []

    def put(*args: Any, **fields: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **fields)

    real = records.put_image
    monkeypatch.setattr(records, "put_image", put)

    assert (await refused(platform, count=2)).reason == error.reason
    generation = await ended(platform)
    assert generation.state == FAILED
    assert len(generation.images) == count(platform, ImageRow) == 1


async def test_models_that_end_early_have_not_drawn_it(
    platform: Platform, painter: Painter
) -> None:
    async def lazy(request: inference_pb2.DiffuseRequest, context: Any) -> Any:
        for event in [e async for e in painter.draw(request, context)][:2]:
            yield event

    platform.models.painter = lazy
    assert isinstance(await refused(platform, count=2), ComputeUnavailableError)
    generation = await ended(platform)
    assert (generation.state, len(generation.images)) == (FAILED, 1)


async def test_a_bug_is_not_told_in_detail(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(records, "put_image", broken)
    assert "secret" not in (await refused(platform)).message
    assert (await ended(platform)).state == FAILED


async def test_a_generation_of_a_dead_process_is_given_up(
    platform: Platform, painter: Painter
) -> None:
    await generate(platform, count=1, request_id="one")
    with platform.catalog.transaction() as session:
        row = session.scalars(select(GenerationRow)).one()
        row.state, row.end_time = "RUNNING", None
        row.heartbeat_time = now() - timedelta(seconds=2 * records.ABANDONED_SECONDS)
        session.delete(session.scalars(select(ImageRow)).one())
    service_records = records.GenerationRecords(
        platform.settings, platform.catalog, platform.store, lambda _: pytest.fail("not needed")
    )

    assert service_records.give_up_abandoned() == 1
    assert (await only_generation(platform)).state == FAILED
    events = await generate(platform, count=1, request_id="one")
    assert events[-1].generation.state == SUCCEEDED
    assert len(events[-1].generation.images) == 1


async def test_images_may_be_asked_for_without_a_stream(
    platform: Platform, painter: Painter
) -> None:
    fields = {"parent": PARENT, "prompt": "a red dress", "seed": 7, "count": 2, "request_id": "one"}
    request = generate_pb2.GenerateImagesRequest(request=fields)
    answer = await stub(platform).GenerateImages(request)
    assert answer.generation.state == SUCCEEDED
    assert [image.seed for image in answer.generation.images] == [7, 8]
    assert (await generate(platform, count=2, request_id="one"))[-1].generation == answer.generation
    with pytest.raises(grpc.RpcError) as caught:
        await stub(platform).GenerateImages(generate_pb2.GenerateImagesRequest())
    assert from_rpc_error(caught.value).reason == "BAD_RESOURCE_NAME"


async def test_a_generation_is_told_how_many_go_before_it(
    platform: Platform, painter: Painter
) -> None:
    painter.pause_after = 0
    calls = []
    positions = []
    for number in range(3):
        stream = call(platform, request_id=f"request-{number}")
        calls.append(stream)
        positions.append((await stream.read()).accepted.queue_position)
    follower = call(platform, request_id="request-1")
    assert (await follower.read()).accepted.queue_position == 1
    assert positions == [0, 1, 2]
    painter.go_on.set()
    for stream in (*calls, follower):
        while await stream.read() is not grpc.aio.EOF:
            pass
    assert (await generate(platform, request_id="request-2"))[0].accepted.queue_position == 0


async def test_generations_are_listed_newest_first(platform: Platform, painter: Painter) -> None:
    names = [(await generate(platform))[-1].generation.name for _ in range(3)]
    request = generate_pb2.ListGenerationsRequest(parent=PARENT, page_size=2)
    first = await stub(platform).ListGenerations(request)
    request.page_token = first.next_page_token
    second = await stub(platform).ListGenerations(request)
    listed = [g.name for page in (first, second) for g in page.generations]
    assert listed == names[::-1]
    assert all(len(g.images) == 1 for g in first.generations)
    assert not second.next_page_token
    other = generate_pb2.ListGenerationsRequest(parent="projects/rival")
    assert not (await stub(platform).ListGenerations(other)).generations


async def test_an_upload_keeps_its_bytes_and_its_name(platform: Platform) -> None:
    data = png(np.full((32, 40, 3), 99, np.uint8))
    image = await upload(platform, data, "a grey square")
    again = await upload(platform, data, "something else")

    assert again == image
    assert (image.width, image.height, image.media_type) == (40, 32, "image/png")
    assert image.prompt == "a grey square"
    assert not image.HasField("seed")
    assert await download(platform, image.name) == data
    read = await stub(platform).GetImage(generate_pb2.GetImageRequest(name=image.name))
    assert read.image == image
    assert count(platform, ImageRow) == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EMPTY_FILE"),
        (b"hello", "NOT_AN_IMAGE"),
        (
            png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:-900],
            "TRUNCATED_IMAGE",
        ),
    ],
)
async def test_bad_uploads_are_refused(platform: Platform, data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError) as caught:
        await upload(platform, data)
    assert caught.value.reason == reason
    assert count(platform, ImageRow) == 0


async def test_an_upload_without_header_is_refused(platform: Platform) -> None:
    async def messages() -> AsyncIterator[generate_pb2.UploadImageRequest]:
        yield generate_pb2.UploadImageRequest(chunk=b"x")

    with pytest.raises(grpc.RpcError) as caught:
        await stub(platform).UploadImage(messages())
    assert isinstance(from_rpc_error(caught.value), InvalidArgumentError)


async def test_unknown_images_are_not_found(platform: Platform) -> None:
    for method, request in (
        ("GetImage", generate_pb2.GetImageRequest(name=f"{PARENT}/images/none")),
        ("GetImageLineage", generate_pb2.GetImageLineageRequest(name=f"{PARENT}/images/none")),
        ("GetGeneration", generate_pb2.GetGenerationRequest(name=f"{PARENT}/generations/none")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await getattr(stub(platform), method)(request)
        assert isinstance(from_rpc_error(caught.value), NotFoundError)
    with pytest.raises(grpc.RpcError) as caught:
        await download(platform, f"{PARENT}/images/none")
    assert isinstance(from_rpc_error(caught.value), NotFoundError)


async def test_lineage_leads_back_to_the_photographs(platform: Platform, painter: Painter) -> None:
    add_adapter(platform)
    adapter = {"model": MODEL_VERSION, "weight": 0.5}
    image = (await generate(platform, adapters=[adapter]))[-1].generation.images[0]
    child = platform.add_image(np.zeros((8, 8, 3), np.uint8))
    with platform.catalog.transaction() as session:
        session.get_one(ImageRow, child).parent_image = image.name

    request = generate_pb2.GetImageLineageRequest(name=child)
    lineage = await stub(platform).GetImageLineage(request)

    assert [one.name for one in lineage.images] == [child, image.name]
    assert lineage.base == "bases/tiny"
    (used,) = lineage.adapters
    assert (used.model_version, used.weight) == (MODEL_VERSION, 0.5)
    assert used.dataset_version == f"{DATASET}/versions/1"
    assert [photograph.file_name for photograph in used.photographs] == ["1.jpg"]


async def test_an_upload_has_no_lineage_but_itself(platform: Platform) -> None:
    image = await upload(platform, png(np.full((32, 32, 3), 9, np.uint8)))
    request = generate_pb2.GetImageLineageRequest(name=image.name)
    lineage = await stub(platform).GetImageLineage(request)
    assert [one.name for one in lineage.images] == [image.name]
    assert not lineage.base
    assert not lineage.adapters


async def test_a_cancelled_call_is_told_so(platform: Platform, painter: Painter) -> None:
    painter.fail_after = (0, CancelledError("the drawing was cancelled"))
    assert isinstance(await refused(platform), CancelledError)
    with contextlib.suppress(ToileError):
        await generate(platform)
