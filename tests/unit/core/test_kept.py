"""What is kept is loaded once, and nobody waits for what others load."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from toile.core.errors import NotFoundError
from toile.core.kept import Kept

SECONDS = 30.0


def test_two_keys_are_loaded_at_once() -> None:
    kept: Kept[str, str] = Kept()
    both = threading.Barrier(2, timeout=SECONDS)

    def load(key: str) -> str:
        both.wait()
        return key.upper()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda key: kept.get(key, lambda: load(key)), "ab")) == ["A", "B"]


def test_what_is_there_is_had_while_another_is_loaded() -> None:
    kept: Kept[str, int] = Kept()
    kept.get("here", lambda: 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        assert go_on.wait(SECONDS)
        return 2

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(kept.get, "slow", slow)
        assert begun.wait(SECONDS)
        assert kept.get("here", lambda: 0) == 1
        go_on.set()
        assert coming.result(SECONDS) == 2


def test_a_key_is_loaded_once_for_all_who_ask() -> None:
    kept: Kept[str, object] = Kept()
    callers = threading.Barrier(8, timeout=SECONDS)
    loads: list[str] = []

    def load() -> object:
        loads.append("load")
        return object()

    def ask(_: int) -> object:
        callers.wait()
        return kept.get("key", load)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert loads == ["load"]


def test_a_failed_load_fails_those_who_wait_and_is_tried_again_by_the_next() -> None:
    kept: Kept[str, int] = Kept()
    begun, go_on = threading.Event(), threading.Event()

    def fail() -> int:
        begun.set()
        assert go_on.wait(SECONDS)
        raise NotFoundError("it is not there")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept.get, "key", fail)
        assert begun.wait(SECONDS)
        second = pool.submit(kept.get, "key", fail)
        go_on.set()
        for waiting in (first, second):
            with pytest.raises(NotFoundError):
                waiting.result(SECONDS)
    assert kept.get("key", lambda: 1) == 1


def test_the_longest_unused_goes_first_and_is_let_go_of() -> None:
    class Thing:
        size = 2

    kept: Kept[str, Thing] = Kept(5, lambda thing: thing.size)
    first, second = weakref.ref(kept.get("a", Thing)), weakref.ref(kept.get("b", Thing))
    kept.get("a", Thing)
    kept.get("c", Thing)
    gc.collect()
    assert first() is not None
    assert second() is None


def test_what_is_dropped_is_loaded_again() -> None:
    kept: Kept[str, object] = Kept()
    first, other = kept.get("a", object), kept.get("b", object)
    kept.drop("a", "none")
    assert kept.get("a", object) is not first
    assert kept.get("b", object) is other
