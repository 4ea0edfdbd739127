"""Images that are there: listed, deleted, linked to."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import grpc
import numpy as np
import pytest
from sqlalchemy import select

from servers.generating import Painter, count, download, generate, stub, upload
from servers.platform import PARENT, PROJECT, Platform, png
from toile.core.catalog.models import (
    GenerationRow,
    ImageRow,
    RankingRow,
    RefinementRow,
    RequestRow,
    ScoreRow,
)
from toile.core.catalog.requests import remember
from toile.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    StoreUnavailableError,
    ToileError,
)
from toile.core.rpc.mapping import from_rpc_error
from toile.v1 import generate_pb2

PICTURE = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)


async def ask(platform: Platform, method: str, **fields: Any) -> Any:
    request = getattr(generate_pb2, f"{method}Request")(**fields)
    try:
        return await getattr(stub(platform), method)(request)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def refusal(platform: Platform, method: str, **fields: Any) -> ToileError:
    with pytest.raises(ToileError) as caught:
        await ask(platform, method, **fields)
    return caught.value


def add_refinement(platform: Platform, source: str, image: str) -> str:
    name = f"{PARENT}/refinements/one"
    with platform.catalog.transaction() as session:
        session.add(
            RefinementRow(
                name=name,
                project=PROJECT,
                source_image=source,
                image=image,
                base="bases/tiny",
                instruction="make it blue",
                plan={},
            )
        )
        remember(session, scope=f"RefineImage {PARENT}", request_id="r", digest="d", resource=name)
    return name


def add_score(platform: Platform, image: str) -> None:
    with platform.catalog.transaction() as session:
        session.add(RankingRow(name=f"{PARENT}/rankings/one", project=PROJECT, scorers=[]))
        session.flush()
        score = ScoreRow(ranking=f"{PARENT}/rankings/one", image=image, scorer="total")
        score.value, score.rank = 1.0, 1
        session.add(score)


async def test_images_are_listed_newest_first(platform: Platform, painter: Painter) -> None:
    uploaded = await upload(platform, png(PICTURE))
    made = list((await generate(platform, count=2))[-1].generation.images)
    other = platform.add_image(PICTURE, project="rival")
    first = await ask(platform, "ListImages", parent=PARENT, page_size=2)
    second = await ask(
        platform, "ListImages", parent=PARENT, page_size=2, page_token=first.next_page_token
    )
    listed = [*first.images, *second.images]
    assert listed == [*reversed(made), uploaded]
    assert not second.next_page_token
    assert other not in {image.name for image in listed}
    assert (await refusal(platform, "ListImages", parent="x")).reason == "BAD_RESOURCE_NAME"


async def test_an_image_is_deleted_with_its_bytes(platform: Platform, painter: Painter) -> None:
    image = await upload(platform, png(PICTURE))
    await ask(platform, "DeleteImage", name=image.name)
    assert count(platform, ImageRow) == 0
    assert not list(platform.store.list("projects/"))
    assert isinstance(await refusal(platform, "GetImage", name=image.name), NotFoundError)
    assert isinstance(await refusal(platform, "DeleteImage", name=image.name), NotFoundError)
    assert await upload(platform, png(PICTURE))  # and may come again


async def test_an_image_in_use_is_kept(platform: Platform, painter: Painter) -> None:
    ranked, refined, parent = (platform.add_image(PICTURE) for _ in range(3))
    add_score(platform, ranked)
    result = platform.add_image(PICTURE)
    add_refinement(platform, refined, result)
    await generate(platform, redesign={"image": parent})
    for name, use in ((ranked, "ranked"), (refined, "refined"), (parent, "made from")):
        error = await refusal(platform, "DeleteImage", name=name)
        assert isinstance(error, FailedPreconditionError)
        assert error.reason == "IMAGE_IN_USE"
        assert error.metadata["name"] == name
        assert use in error.message
        assert await download(platform, name)


async def test_what_a_running_generation_starts_from_is_kept(
    platform: Platform, painter: Painter
) -> None:
    image, mask = platform.add_image(PICTURE), platform.add_image(np.full_like(PICTURE, 255))
    painter.pause_after = 0
    running = asyncio.create_task(generate(platform, inpaint={"image": image, "mask": mask}))
    await painter.begun.wait()
    for name in (image, mask):
        assert (await refusal(platform, "DeleteImage", name=name)).reason == "IMAGE_IN_USE"
    painter.go_on.set()
    await running
    await ask(platform, "DeleteImage", name=mask)


async def test_a_refined_image_is_deleted_with_its_refinement(
    platform: Platform, painter: Painter
) -> None:
    source, result = platform.add_image(PICTURE), platform.add_image(PICTURE)
    add_refinement(platform, source, result)
    await ask(platform, "DeleteImage", name=result)
    assert count(platform, RefinementRow) == count(platform, RequestRow) == 0
    await ask(platform, "DeleteImage", name=source)
    assert count(platform, ImageRow) == 0


async def test_bytes_that_stay_behind_are_no_error(
    platform: Platform, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise StoreUnavailableError("the store is away")

    image = platform.add_image(PICTURE)
    monkeypatch.setattr(type(platform.store), "delete", away)
    await ask(platform, "DeleteImage", name=image)
    assert count(platform, ImageRow) == 0


async def test_a_generation_is_deleted_with_its_images(
    platform: Platform, painter: Painter
) -> None:
    first = (await generate(platform, count=2, request_id="one"))[-1].generation
    await ask(platform, "DeleteGeneration", name=first.name)
    assert count(platform, GenerationRow) == count(platform, ImageRow) == 0
    assert count(platform, RequestRow) == 0
    assert not list(platform.store.list("projects/"))
    assert isinstance(await refusal(platform, "GetGeneration", name=first.name), NotFoundError)
    again = (await generate(platform, count=2, request_id="one"))[-1].generation
    assert again.name != first.name
    assert len(painter.requests) == 2


async def test_a_generation_with_an_image_in_use_is_kept_whole(
    platform: Platform, painter: Painter
) -> None:
    made = (await generate(platform, count=3))[-1].generation
    add_score(platform, made.images[1].name)
    error = await refusal(platform, "DeleteGeneration", name=made.name)
    assert (error.reason, error.metadata["name"]) == ("IMAGE_IN_USE", made.images[1].name)
    assert (await ask(platform, "GetGeneration", name=made.name)).generation == made
    for image in made.images:
        assert await download(platform, image.name)


async def test_a_running_generation_is_not_deleted(platform: Platform, painter: Painter) -> None:
    painter.pause_after = 0
    running = asyncio.create_task(generate(platform))
    await painter.begun.wait()
    with platform.catalog.reading() as session:
        name = session.scalars(select(GenerationRow.name)).one()
    error = await refusal(platform, "DeleteGeneration", name=name)
    assert error.reason == "GENERATION_RUNNING"
    painter.go_on.set()
    await running


async def test_a_link_leads_to_the_bytes(platform: Platform) -> None:
    image = await upload(platform, png(PICTURE))
    link = await ask(platform, "GetImageLink", name=image.name)
    path = Path(url2pathname(urlparse(link.url).path))
    assert await asyncio.to_thread(path.read_bytes) == png(PICTURE)
    left = link.expire_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert 3500 < left.total_seconds() <= 3600
    week = await ask(platform, "GetImageLink", name=image.name, expires_seconds=604_800)
    assert week.url
    for seconds in (-1, 604_801):
        error = await refusal(platform, "GetImageLink", name=image.name, expires_seconds=seconds)
        assert isinstance(error, InvalidArgumentError)
        assert error.metadata["field"] == "expires_seconds"
    missing = await refusal(platform, "GetImageLink", name=f"{PARENT}/images/none")
    assert isinstance(missing, NotFoundError)
