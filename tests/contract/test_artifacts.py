"""What every artifact store does, wherever the bytes are."""

import contextlib
import hashlib
import io
import random
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toile.core.artifacts import ArtifactInfo, ArtifactStore, open_store
from toile.core.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    StoreUnavailableError,
)

from .conftest import Place

LARGE_BYTES = 40 << 20
BOUND_BYTES = 32 << 20


class Endless(io.RawIOBase):
    """A stream that makes its bytes as it is read, and cannot seek."""

    def __init__(self, size_bytes: int) -> None:
        self.left = size_bytes
        self.digest = hashlib.sha256()
        self._random = random.Random(7)  # noqa: S311 - not for secrets

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk = self._random.randbytes(min(self.left, 1 << 20 if size < 0 else size))
        self.left -= len(chunk)
        self.digest.update(chunk)
        return chunk


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


def info(key: str, data: bytes) -> ArtifactInfo:
    return ArtifactInfo(key, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("form", ["bytes", "path", "stream"])
@pytest.mark.parametrize("data", [b"", b"lace", bytes(range(256)) * 5000], ids=len)
def test_gives_back_what_was_put(
    store: ArtifactStore, tmp_path: Path, form: str, data: bytes
) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    source = {"bytes": data, "path": file, "stream": io.BytesIO(data)}[form]

    assert store.put("a/b.bin", source) == info("a/b.bin", data)

    assert store.get("a/b.bin") == data
    assert store.stat("a/b.bin") == info("a/b.bin", data)
    with store.open("a/b.bin") as stream:
        assert stream.read() == data


def test_streams_what_is_larger_than_its_buffers(store: ArtifactStore, tmp_path: Path) -> None:
    source = Endless(LARGE_BYTES)
    with bounded_memory():
        put = store.put("large.safetensors", source)
    assert put == ArtifactInfo("large.safetensors", LARGE_BYTES, source.digest.hexdigest())
    assert store.stat("large.safetensors") == put

    digest = hashlib.sha256()
    with bounded_memory(), store.open("large.safetensors") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    assert digest.hexdigest() == put.digest


def test_a_reader_may_stop_early(store: ArtifactStore) -> None:
    store.put("large", bytes(LARGE_BYTES))
    for _ in range(3):
        with store.open("large") as stream:
            assert stream.read(10) == bytes(10)
    assert store.exists("large")


def test_putting_again_replaces(store: ArtifactStore) -> None:
    store.put("k", b"first, and longer")
    store.put("k", b"second")
    assert store.get("k") == b"second"
    assert store.stat("k") == info("k", b"second")


def test_a_reader_is_not_disturbed_by_a_replacement(store: ArtifactStore) -> None:
    store.put("k", b"first")
    with store.open("k") as stream:
        store.put("k", b"other")
        assert stream.read() == b"first"


def test_what_is_absent(store: ArtifactStore) -> None:
    store.put("here/file", b"x")
    for key in ("nowhere", "here", "here/file/inside", "here/fil"):
        assert not store.exists(key)
        with pytest.raises(NotFoundError):
            store.get(key)
        with pytest.raises(NotFoundError):
            store.stat(key)
        with pytest.raises(NotFoundError), store.open(key):
            pass
        store.delete(key)
    assert store.get("here/file") == b"x"


def test_deletes(store: ArtifactStore) -> None:
    store.put("a/b", b"x")
    store.delete("a/b")
    assert not store.exists("a/b")
    assert list(store.list("")) == []
    store.put("a/b", b"y", if_absent=True)
    assert store.get("a/b") == b"y"


def test_lists_sorted_by_key_with_digests(store: ArtifactStore) -> None:
    keys = ["a-b/1", "a/1", "a/10", "a/2/x", "a.b", "ab", "b/é ü", "b/日本", "Z"]
    for key in keys:
        store.put(key, key.encode())

    def listed(prefix: str) -> list[ArtifactInfo]:
        return list(store.list(prefix))

    everything = [info(key, key.encode()) for key in sorted(keys)]
    assert listed("") == everything
    assert listed("a/") == [each for each in everything if each.key.startswith("a/")]
    assert listed("a/1") == [each for each in everything if each.key.startswith("a/1")]
    assert listed("a") == [each for each in everything if each.key.startswith("a")]
    assert listed("b/é ü") == [info("b/é ü", "b/é ü".encode())]
    assert listed("nothing/here/") == []
    assert listed("a/1/none") == []


@pytest.mark.parametrize("prefix", ["/", "a//", "../", "a/../", "\x00"])
def test_refuses_to_list_what_no_key_begins_with(store: ArtifactStore, prefix: str) -> None:
    with pytest.raises(InvalidArgumentError):
        list(store.list(prefix))


BAD_KEYS = ["", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../a", "a/../../b", "a/./b"]
BAD_KEYS += ["a\\b", "a\nb", "a\x00b", "a\u202eb", "a\ufffe", "\ud800", " a", "a/b ", "x" * 251]
BAD_KEYS += ["/".join(["segment"] * 150)]


@pytest.mark.parametrize("key", BAD_KEYS, ids=lambda key: ascii(key[:12]))
def test_refuses_bad_keys(store: ArtifactStore, key: str) -> None:
    with pytest.raises(InvalidArgumentError):
        store.put(key, b"x")
    with pytest.raises(InvalidArgumentError):
        store.get(key)
    with pytest.raises(InvalidArgumentError):
        store.delete(key)
    with pytest.raises(InvalidArgumentError):
        store.presigned_url(key)
    assert list(store.list("")) == []


SEGMENT = st.text(
    st.characters(exclude_characters="/\\", exclude_categories=["C", "Z"]), min_size=1, max_size=20
).filter(lambda segment: segment not in {".", ".."})
KEYS = st.lists(SEGMENT, min_size=1, max_size=4).map("/".join)


def test_a_key_may_take_the_place_of_a_deleted_folder(store: ArtifactStore) -> None:
    store.put("a/b/c", b"x")
    store.delete("a/b/c")
    store.put("a", b"y")
    assert list(store.list("")) == [info("a", b"y")]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(key=KEYS)
def test_any_printable_key_comes_back(store: ArtifactStore, key: str) -> None:
    store.put(key, key.encode())
    try:
        assert store.get(key) == key.encode()
        assert list(store.list("")) == [info(key, key.encode())]
        with urllib.request.urlopen(store.presigned_url(key)) as response:  # noqa: S310
            assert response.read() == key.encode()
    finally:
        store.delete(key)


@pytest.mark.parametrize("size_bytes", [5, 9 << 20], ids=["small", "in parts"])
def test_creates_only_if_absent(store: ArtifactStore, size_bytes: int) -> None:
    store.put("k", b"1" * size_bytes, if_absent=True)
    with pytest.raises(AlreadyExistsError):
        store.put("k", b"2" * size_bytes, if_absent=True)
    assert store.get("k") == b"1" * size_bytes
    assert [each.key for each in store.list("")] == ["k"]


@pytest.mark.parametrize("size_bytes", [5, 9 << 20], ids=["small", "in parts"])
def test_of_racing_creators_one_wins(store: ArtifactStore, size_bytes: int) -> None:
    racers = 4
    for round_ in range(10 if size_bytes < 1000 else 1):
        barrier = Barrier(racers)

        def create(number: int, key: str = f"k{round_}", barrier: Barrier = barrier) -> bool:
            barrier.wait()
            try:
                store.put(key, bytes([number]) * size_bytes, if_absent=True)
            except AlreadyExistsError:
                return False
            return True

        with ThreadPoolExecutor(racers) as pool:
            won = list(pool.map(create, range(racers)))
        assert sum(won) == 1
        assert store.get(f"k{round_}") == bytes([won.index(True)]) * size_bytes


def test_a_presigned_link_needs_nothing_else(store: ArtifactStore) -> None:
    store.put("projects/p/images/a b#c%20+é.png", b"pixels")
    url = store.presigned_url("projects/p/images/a b#c%20+é.png", expires_seconds=60)
    with urllib.request.urlopen(url) as response:  # noqa: S310
        assert response.read() == b"pixels"


def test_an_altered_or_old_link_is_refused(place: Place, store: ArtifactStore) -> None:
    if place.settings.artifacts_url != "s3":
        pytest.skip("a file: link cannot be refused; the contract says so")
    store.put("mine", b"x")
    store.put("other", b"secret")
    link = store.presigned_url("mine", expires_seconds=60)
    expired = store.presigned_url("mine", expires_seconds=1)
    time.sleep(2.1)
    forever = expired.replace("X-Amz-Expires=1&", "X-Amz-Expires=600&")
    assert forever != expired
    for url in (link.replace("/mine?", "/other?"), link[:-1] + "zz", expired, forever):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url)  # noqa: S310
        assert caught.value.code == 403
        caught.value.close()


@pytest.mark.parametrize("seconds", [0, -1, 7 * 24 * 3600 + 1])
def test_refuses_links_that_nobody_can_sign(store: ArtifactStore, seconds: int) -> None:
    with pytest.raises(InvalidArgumentError):
        store.presigned_url("k", expires_seconds=seconds)


def test_says_quickly_that_the_store_is_away_and_recovers(place: Place) -> None:
    store = open_store(place.settings)
    store.check()
    store.put("k", b"before")
    place.take_away()
    try:
        for use in (
            store.check,
            lambda: store.get("k"),
            lambda: store.stat("k"),
            lambda: store.exists("k"),
            lambda: list(store.list("")),
            lambda: store.delete("k"),
            lambda: store.put("k", b"during"),
            lambda: store.put("k", bytes(20 << 20), if_absent=True),
        ):
            start = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                use()
            assert time.monotonic() - start < 15
    finally:
        place.bring_back()
    store.check()
    assert store.get("k") == b"before"
    store.put("k", b"after")
    assert [each.key for each in store.list("")] == ["k"]


def test_goes_away_in_the_middle_of_reading(place: Place, store: ArtifactStore) -> None:
    if place.settings.artifacts_url != "s3":
        pytest.skip("an open file outlives its folder's name")
    store.put("large", bytes(LARGE_BYTES))
    with store.open("large") as stream:
        stream.read(10)
        place.take_away()
        try:
            with pytest.raises(StoreUnavailableError):
                stream.read()
        finally:
            place.bring_back()
