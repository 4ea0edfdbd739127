import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import func, select

from servers.platform import DATASET, PARENT, VERSION, Platform, garment, running_platform
from toile.core.catalog.models import DatasetRow, ImageRow, RankingRow, ScoreRow
from toile.core.errors import ComputeUnavailableError, ExhaustedError, ToileError
from toile.core.rpc.mapping import from_rpc_error
from toile.rank.__main__ import build_service
from toile.v1 import rank_pb2, rank_pb2_grpc

RED, BLUE, GREEN = (206, 32, 40), (38, 94, 204), (46, 142, 66)


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with running_platform(tmp_path, build_service) as running:
        yield running


def stub(platform: Platform) -> Any:
    return rank_pb2_grpc.RankServiceStub(platform.channel)


async def rank(platform: Platform, **fields: Any) -> list[rank_pb2.RankImagesResponse]:
    request = rank_pb2.RankImagesRequest(**{"parent": PARENT, **fields})
    try:
        return [event async for event in stub(platform).RankImages(request)]
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def refused(platform: Platform, **fields: Any) -> ToileError:
    with pytest.raises(ToileError) as caught:
        await rank(platform, **fields)
    return caught.value


def rows(platform: Platform, table: Any) -> int:
    with platform.catalog.reading() as session:
        return int(session.scalar(select(func.count()).select_from(table)) or 0)


async def test_the_image_that_shows_the_prompt_comes_first(platform: Platform) -> None:
    prompt = "a red dress"
    images = [platform.add_image(garment(c), prompt=prompt) for c in (GREEN, RED, BLUE)]

    events = await rank(platform, images=images)

    assert [event.scored.image for event in events[:-1]] == images
    assert all(event.scored.rank == 0 for event in events[:-1])
    ranking = events[-1].ranking
    assert ranking.images[0].image == images[1]
    assert [image.rank for image in ranking.images] == [1, 2, 3]
    totals = [image.total for image in ranking.images]
    assert totals == sorted(totals, reverse=True)
    assert all(0 <= total <= 1 for total in totals)
    assert {s.scorer: s.weight for s in ranking.scorers} == {
        "prompt": 1.0,
        "colour": 0.5,
        "sharpness": 0.25,
    }
    assert {s.scorer for s in ranking.images[0].scores} == {"prompt", "colour", "sharpness"}


async def test_a_ranking_is_read_back_and_listed(platform: Platform) -> None:
    images = [platform.add_image(garment(c), prompt="a blue hat") for c in (RED, BLUE)]
    first = (await rank(platform, images=images))[-1].ranking
    second = (await rank(platform, images=images[:1]))[-1].ranking

    found = await stub(platform).GetRanking(rank_pb2.GetRankingRequest(name=first.name))
    assert found.ranking == first
    page = await stub(platform).ListRankings(
        rank_pb2.ListRankingsRequest(parent=PARENT, page_size=1)
    )
    assert [ranking.name for ranking in page.rankings] == [second.name]
    rest = await stub(platform).ListRankings(
        rank_pb2.ListRankingsRequest(parent=PARENT, page_token=page.next_page_token)
    )
    assert [ranking.name for ranking in rest.rankings] == [first.name]
    assert not rest.next_page_token


async def test_scorers_say_what_they_are(platform: Platform) -> None:
    answer = await stub(platform).ListScorers(rank_pb2.ListScorersRequest())
    by_name = {scorer.name: scorer for scorer in answer.scorers}
    assert list(by_name) == sorted(by_name)
    assert by_name["style"].needs_dataset
    assert not by_name["prompt"].needs_dataset
    assert by_name["novelty"].default_weight == 0
    assert all(scorer.description for scorer in by_name.values())


async def test_style_prefers_what_looks_like_the_dataset(platform: Platform) -> None:
    platform.add_dataset(*(garment(GREEN, size=(64 + n, 64)) for n in range(6)))
    images = [platform.add_image(garment(c)) for c in (RED, GREEN)]

    for dataset in (DATASET, VERSION):
        ranking = (await rank(platform, images=images, dataset=dataset))[-1].ranking
        assert "style" in {scorer.scorer for scorer in ranking.scorers}
        assert ranking.images[0].image == images[1]

    novelty = [rank_pb2.ScorerWeight(scorer="novelty")]
    ranking = (await rank(platform, images=images, dataset=DATASET, scorers=novelty))[-1].ranking
    assert ranking.images[0].image == images[0]


async def test_embeddings_of_a_version_are_computed_once(
    platform: Platform, tmp_path: Path
) -> None:
    platform.add_dataset(*(garment(GREEN, size=(64 + n, 64)) for n in range(20)))
    image = platform.add_image(garment(GREEN))
    style = [rank_pb2.ScorerWeight(scorer="style")]
    await rank(platform, images=[image], dataset=DATASET, scorers=style)
    before = platform.models.calls["EmbedImages"]
    await rank(platform, images=[image], dataset=DATASET, scorers=style)
    assert platform.models.calls["EmbedImages"] == before + 1  # the image's own

    (kept,) = platform.store.list(f"{DATASET}/embeddings/")
    platform.store.put(kept.key, b"damaged")
    async with running_platform_over(platform) as again:  # a new process has an empty memory
        events = await rank(again, images=[image], dataset=DATASET, scorers=style)
        assert events[-1].ranking.images[0].scores[0].value > 0.99


def running_platform_over(platform: Platform) -> Any:
    """The same catalog and store, served by another process."""
    import contextlib

    from toile.core.rpc.server import start

    @contextlib.asynccontextmanager
    async def another() -> AsyncIterator[Platform]:
        service = await start(build_service(platform.settings), platform.settings)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            yield Platform(
                platform.settings,
                platform.catalog,
                platform.store,
                platform.models,
                service,
                channel,
            )
        await service.stop()

    return another()


async def test_only_what_the_scorers_need_is_asked_of_the_models(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red hat")
    await rank(platform, images=[image], scorers=[rank_pb2.ScorerWeight(scorer="colour")])
    assert set(platform.models.calls) == {"SegmentImage"}


async def test_a_prompt_of_the_request_replaces_the_images_own(platform: Platform) -> None:
    images = [platform.add_image(garment(c), prompt="a red dress") for c in (RED, BLUE)]
    ranking = (await rank(platform, images=images, prompt="a blue dress"))[-1].ranking
    assert ranking.images[0].image == images[1]


async def test_images_without_a_prompt_are_ranked_by_what_is_left(platform: Platform) -> None:
    flat, crisp = garment(RED), garment(RED)
    crisp[::2, ::2] = 0
    images = [platform.add_image(flat), platform.add_image(crisp)]
    ranking = (await rank(platform, images=images))[-1].ranking
    assert ranking.images[0].image == images[1]
    assert {score.scorer for score in ranking.images[0].scores} == {"sharpness"}


async def test_equal_images_are_equal_and_ordered_by_name(platform: Platform) -> None:
    images = [platform.add_image(garment(RED), prompt="a red dress") for _ in range(4)]
    ranking = (await rank(platform, images=list(reversed(images))))[-1].ranking
    assert [image.total for image in ranking.images] == [0.5] * 4
    assert [image.image for image in ranking.images] == sorted(images)


async def test_images_larger_than_a_message_are_ranked(tmp_path: Path) -> None:
    limits = {"message_bytes": 1 << 20}
    async with running_platform(tmp_path, build_service, limits=limits) as platform:
        noise = np.random.default_rng(0).integers(0, 255, (600, 700, 3), dtype=np.uint8)
        images = [platform.add_image(noise, prompt="a red dress") for _ in range(3)]
        ranking = (await rank(platform, images=images))[-1].ranking
        assert len(ranking.images) == 3
        assert platform.models.calls["EmbedImages"] == 3


async def test_a_repeated_request_gets_the_first_answer(platform: Platform) -> None:
    images = [platform.add_image(garment(c), prompt="a red dress") for c in (GREEN, RED)]
    first = await rank(platform, images=images, request_id="r1")
    calls = platform.models.calls.copy()
    second = await rank(platform, images=images, request_id="r1")
    assert second[-1].ranking == first[-1].ranking
    assert {event.scored.image for event in second[:-1]} == set(images)
    assert platform.models.calls == calls
    assert rows(platform, RankingRow) == 1

    error = await refused(platform, images=images[:1], request_id="r1")
    assert error.reason == "REQUEST_ID_REUSED"


async def test_equal_requests_at_the_same_time_make_one_ranking(platform: Platform) -> None:
    images = [platform.add_image(garment(c), prompt="a red dress") for c in (GREEN, RED)]
    answers = await asyncio.gather(
        *(rank(platform, images=images, request_id="same") for _ in range(4))
    )
    assert len({answer[-1].ranking.name for answer in answers}) == 1
    assert rows(platform, RankingRow) == 1


async def test_a_client_that_goes_away_leaves_nothing(platform: Platform) -> None:
    images = [platform.add_image(garment(RED), prompt="a red dress") for _ in range(40)]
    call = stub(platform).RankImages(rank_pb2.RankImagesRequest(parent=PARENT, images=images))
    await call.read()
    call.cancel()
    await asyncio.sleep(0.5)
    assert rows(platform, RankingRow) == rows(platform, ScoreRow) == 0
    assert platform.models.calls["SegmentImage"] < 40


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"images": []}, "IMAGE_COUNT"),
        ({"images": ["nonsense"]}, "BAD_RESOURCE_NAME"),
        ({"images": ["projects/other/images/a"]}, "OTHER_PROJECT"),
        ({"images": [f"{PARENT}/images/none"]}, "NOT_FOUND"),
        ({"images": ["{image}", "{image}"]}, "DUPLICATE_IMAGE"),
        ({"parent": "studio"}, "BAD_RESOURCE_NAME"),
        ({"scorers": [{"scorer": "beauty"}]}, "UNKNOWN_SCORER"),
        ({"scorers": [{"scorer": "style"}]}, "DATASET_NEEDED"),
        ({"scorers": [{"scorer": "prompt"}, {"scorer": "prompt"}]}, "BAD_WEIGHT"),
        ({"scorers": [{"scorer": "prompt", "weight": -1}]}, "BAD_WEIGHT"),
        ({"scorers": [{"scorer": "prompt", "weight": float("nan")}]}, "BAD_WEIGHT"),
        ({"scorers": [{"scorer": "prompt", "weight": float("inf")}]}, "BAD_WEIGHT"),
        ({"scorers": [{"scorer": "prompt", "weight": 0}]}, "BAD_WEIGHT"),
        ({"dataset": f"{PARENT}/datasets/none"}, "NOT_FOUND"),
        ({"dataset": f"{PARENT}/datasets/none/versions/1"}, "NOT_FOUND"),
        ({"dataset": "projects/other/datasets/lace"}, "OTHER_PROJECT"),
        ({"dataset": "lace"}, "BAD_RESOURCE_NAME"),
        ({"dataset": f"{PARENT}/datasets/unbuilt"}, "DATASET_NOT_BUILT"),
        ({"prompt": "x" * 10_000}, "PROMPT_TOO_LONG"),
        ({"request_id": "x" * 200}, "INVALID_ARGUMENT"),
    ],
)
async def test_a_wrong_request_is_refused_before_it_costs_anything(
    platform: Platform, fields: dict[str, Any], reason: str
) -> None:
    image = platform.add_image(garment(RED), prompt="a red dress")
    with platform.catalog.transaction() as session:
        unbuilt = DatasetRow(name=f"{PARENT}/datasets/unbuilt", project="studio", trigger_word="x")
        session.add(unbuilt)
    wanted = {"images": [image], **fields}
    wanted["images"] = [name.format(image=image) for name in wanted["images"]]
    assert (await refused(platform, **wanted)).reason == reason
    assert not platform.models.calls
    assert rows(platform, RankingRow) == 0


async def test_more_images_than_the_limit_are_refused(tmp_path: Path) -> None:
    limits = {"images_per_ranking": 2}
    async with running_platform(tmp_path, build_service, limits=limits) as platform:
        images = [platform.add_image(garment(RED)) for _ in range(3)]
        assert (await refused(platform, images=images)).reason == "IMAGE_COUNT"
        assert len(await rank(platform, images=images[:2])) == 3


async def test_an_unknown_scorer_error_names_the_scorers(platform: Platform) -> None:
    image = platform.add_image(garment(RED))
    error = await refused(platform, images=[image], scorers=[{"scorer": "beauty"}])
    for name in ("colour", "novelty", "prompt", "sharpness", "style"):
        assert name in error.message


@pytest.mark.parametrize("failure", ["away", "full"])
async def test_models_that_fail_leave_no_ranking(platform: Platform, failure: str) -> None:
    image = platform.add_image(garment(RED), prompt="a red dress")
    error: ToileError = ComputeUnavailableError("gone")
    if failure == "full":
        error = ExhaustedError("busy")
    platform.models.errors["SegmentImage"] = error
    assert type(await refused(platform, images=[image], request_id="a")) is type(error)
    assert rows(platform, RankingRow) == 0
    platform.models.errors.clear()
    assert len(await rank(platform, images=[image], request_id="a")) == 2


async def test_embeddings_that_are_not_numbers_are_refused(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red dress")
    platform.models.broken = True
    assert (await refused(platform, images=[image])).reason == "BAD_EMBEDDING"
    assert rows(platform, RankingRow) == 0


async def test_an_image_whose_bytes_are_gone_or_damaged(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red dress")
    with platform.catalog.reading() as session:
        key = session.get_one(ImageRow, image).artifact
    platform.store.put(key, b"not a picture")
    assert (await refused(platform, images=[image])).reason == "DATA_LOSS"
    platform.store.delete(key)
    assert (await refused(platform, images=[image])).reason == "ARTIFACT_NOT_FOUND"
    assert rows(platform, RankingRow) == 0


async def test_a_store_that_is_away_is_a_typed_error(platform: Platform) -> None:
    image = platform.add_image(garment(RED), prompt="a red dress")
    folder = platform.settings.home_path / "artifacts"
    folder.rename(folder.with_name("away"))
    error = await refused(platform, images=[image])
    assert error.reason == "STORE_UNAVAILABLE"
    assert rows(platform, RankingRow) == 0
    folder.with_name("away").rename(folder)
    assert len(await rank(platform, images=[image])) == 2


async def test_an_unknown_ranking_is_not_found(platform: Platform) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await stub(platform).GetRanking(rank_pb2.GetRankingRequest(name=f"{PARENT}/rankings/a"))
    assert from_rpc_error(caught.value).reason == "NOT_FOUND"
