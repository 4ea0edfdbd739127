"""The server's adapters: read in the background, dropped for room and by name."""

import functools
import http.server
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from toile.diffusion.bank import BankError, BankLayout, PackedAdapter, pack
from toile.diffusion.triton.resident import (
    LOADING,
    MISSING,
    UNREAD,
    ResidentAdapters,
    read_packed,
)

LAYOUT = BankLayout.of({"a": (8, 4), "b": (8, 4)})


@pytest.fixture
def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def link(tmp_path: Path) -> str:
    layers = {"a": (np.ones((2, 8)), np.ones((4, 2)), 2.0)}
    pack(layers, LAYOUT).save(tmp_path / "an adapter.safetensors", LAYOUT)
    return (tmp_path / "an adapter.safetensors").as_uri()


def made(budget_bytes: int = 1 << 20, place=lambda adapter: adapter) -> ResidentAdapters:
    return ResidentAdapters(LAYOUT, budget_bytes, place)


def loaded(adapters: ResidentAdapters, key: str, link: str) -> PackedAdapter:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return adapters.get(key, link)
        except BankError as error:
            if not str(error).startswith(LOADING):
                raise
            time.sleep(0.001)
    raise TimeoutError


def test_an_adapter_is_asked_for_by_link_once(link: str) -> None:
    adapters = made()
    with pytest.raises(BankError, match=MISSING):
        adapters.get("x")
    adapter = loaded(adapters, "x", link)
    assert adapters.get("x") is adapter
    assert (adapters.bytes, len(adapters.loaded)) == (adapter.size_bytes, 1)


def test_one_that_is_being_read_can_be_waited_for(link: str) -> None:
    adapters = made(place=lambda adapter: time.sleep(0.05) or adapter)
    with pytest.raises(BankError, match=LOADING):
        adapters.get("x", link)
    adapters.wait(0.0)
    with pytest.raises(BankError, match=LOADING):
        adapters.get("x")
    adapters.wait(10.0)
    assert adapters.get("x").rank == 2


def test_an_adapter_is_read_from_a_server(link: str) -> None:
    folder = Path(urllib.parse.unquote(urllib.parse.urlsplit(link).path)).parent
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            adapter = read_packed(f"{address}/an%20adapter.safetensors", LAYOUT)
            with pytest.raises(BankError, match="could not be read"):
                read_packed(f"{address}/nowhere", LAYOUT)
        finally:
            server.shutdown()
            thread.join()
    for name, array in read_packed(link, LAYOUT).arrays.items():
        np.testing.assert_array_equal(array, adapter.arrays[name])


def test_it_is_placed_where_the_engine_wants_it(link: str) -> None:
    placed: list[PackedAdapter] = []

    def place(adapter: PackedAdapter) -> PackedAdapter:
        placed.append(adapter)
        return PackedAdapter({n: a.astype(np.float32) for n, a in adapter.arrays.items()})

    found = loaded(made(place=place), "x", link)
    assert found.size_bytes == 2 * placed[0].size_bytes


def test_an_adapter_is_dropped_by_name(link: str) -> None:
    adapters = made()
    assert not adapters.unload("x")
    loaded(adapters, "x", link)
    loaded(adapters, "y", link)
    assert adapters.unload("x")
    assert adapters.bytes == adapters.get("y").size_bytes
    with pytest.raises(BankError, match=MISSING):
        adapters.get("x")
    loaded(adapters, "x", link)


def test_one_that_is_being_read_is_dropped_too(link: str) -> None:
    adapters = made()
    with pytest.raises(BankError, match=LOADING):
        adapters.get("x", link)
    assert adapters.unload("x")
    with pytest.raises(BankError, match=MISSING):
        adapters.get("x")
    assert adapters.bytes == 0


def test_the_least_recently_used_goes_for_room(link: str) -> None:
    one = loaded(made(), "x", link).size_bytes
    adapters = made(2 * one)
    for key in "xyz":
        loaded(adapters, key, link)
        adapters.get("x", link)
    assert adapters.shrink() == 1
    with pytest.raises(BankError, match=MISSING):
        adapters.get("y")
    assert {adapters.get("x").rank, adapters.get("z").rank} == {2}


@pytest.mark.parametrize("link", ["ftp://x/y", "no link", "file:///no/such/file"])
def test_what_leads_to_no_adapter_is_an_error_each_time(link: str) -> None:
    adapters = made()
    for _ in range(2):
        with pytest.raises(BankError, match=r"no link|not a packed|No such"):
            loaded(adapters, "x", link)


def test_what_nobody_came_back_for_counts_and_goes_for_room(link: str) -> None:
    one = loaded(made(), "x", link).size_bytes
    adapters = made(budget_bytes=2 * one)
    for key in "abcd":
        with pytest.raises(BankError, match=LOADING):
            adapters.get(key, link)
    dropped = 0
    deadline = time.monotonic() + 10
    while len(adapters.loaded) < 4 and time.monotonic() < deadline:
        dropped += adapters.shrink()
    assert (dropped, adapters.bytes) == (2, 2 * one)


def test_a_reading_that_failed_is_told_to_who_asks(tmp_path: Path) -> None:
    adapters, nowhere = made(), (tmp_path / "nowhere").as_uri()
    with pytest.raises(BankError, match=LOADING):
        adapters.get("x", nowhere)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        adapters.shrink()
        try:
            adapters.get("x", nowhere)
        except BankError as error:
            told = str(error)
            if not told.startswith(LOADING):
                break
    assert "not a packed adapter" in told
    assert adapters.bytes == 0


def test_a_link_that_leads_nowhere_for_a_moment_is_read_when_it_is_asked_for_again(
    link: str, tmp_path: Path
) -> None:
    file, away = tmp_path / "an adapter.safetensors", tmp_path / "away"
    file.rename(away)
    adapters = made()
    with pytest.raises(BankError, match=UNREAD):
        loaded(adapters, "x", link)
    away.rename(file)
    assert loaded(adapters, "x", link).rank == 2


def test_a_store_that_does_not_answer_may_be_asked_again(free_port: int) -> None:
    with pytest.raises(BankError, match=UNREAD):
        loaded(made(), "x", f"http://127.0.0.1:{free_port}/adapter")


def test_a_damaged_file_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"not safetensors")
    with pytest.raises(BankError, match="not a packed adapter") as caught:
        loaded(made(), "x", (tmp_path / "damaged").as_uri())
    assert UNREAD not in str(caught.value)
