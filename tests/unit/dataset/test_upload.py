from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toile.core.errors import InvalidArgumentError
from toile.dataset.upload import Upload
from toile.v1.dataset_pb2 import FileStart, ImportHeader, ImportImagesRequest

HEADER = ImportImagesRequest(header=ImportHeader(dataset="projects/p/datasets/d"))


async def stream(requests: Sequence[ImportImagesRequest]) -> AsyncIterator[ImportImagesRequest]:
    for request in requests:
        yield request


def start(name: str) -> ImportImagesRequest:
    return ImportImagesRequest(file=FileStart(file_name=name, caption=f"about {name}"))


def chunk(data: bytes) -> ImportImagesRequest:
    return ImportImagesRequest(chunk=data)


async def received(
    requests: Sequence[ImportImagesRequest], most_bytes: int = 1000
) -> list[tuple[str, str, bytes]]:
    with Upload(stream(requests), most_bytes) as upload:
        await upload.header()
        return [
            (file.file_name, file.caption, file.path.read_bytes()) async for file in upload.files()
        ]


async def test_files_arrive_whole_and_in_order() -> None:
    requests = [HEADER, start("a"), chunk(b"one "), chunk(b"two"), start("b"), start("c")]
    assert await received([*requests, chunk(b"3")]) == [
        ("a", "about a", b"one two"),
        ("b", "about b", b""),
        ("c", "about c", b"3"),
    ]


async def test_no_more_is_spooled_than_tells_that_a_file_is_too_long() -> None:
    requests = [HEADER, start("long"), *[chunk(bytes(700))] * 5, start("next"), chunk(b"n")]
    files = await received(requests)
    assert [(name, len(data)) for name, _, data in files] == [("long", 1001), ("next", 1)]


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [start("a")],
        [chunk(b"x")],
        [ImportImagesRequest()],
        [HEADER, chunk(b"x")],
        [HEADER, HEADER],
        [HEADER, start("a"), HEADER],
        [HEADER, start("a"), ImportImagesRequest()],
    ],
)
async def test_messages_out_of_place_are_refused(requests: list[ImportImagesRequest]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await received(requests)
    assert caught.value.reason == "BAD_MESSAGE_ORDER"


async def test_nothing_is_left_on_disk() -> None:
    with Upload(stream([HEADER, start("a"), chunk(b"x"), chunk(b"")]), 1000) as upload:
        await upload.header()
        folders: list[Path] = [file.path.parent async for file in upload.files()]
        assert folders[0].exists()
    assert not folders[0].exists()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.binary(max_size=300), max_size=5), max_size=5))
async def test_any_cutting_into_chunks_gives_the_same_files(files: list[list[bytes]]) -> None:
    requests = [HEADER]
    for number, chunks in enumerate(files):
        requests += [start(str(number)), *(chunk(data) for data in chunks)]
    expected = [b"".join(chunks)[:1001] for chunks in files]
    assert [data for _, _, data in await received(requests)] == expected
