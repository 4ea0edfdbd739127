"""A store that is away for a moment costs a reader a wait; what will not change is told at once."""

import time
from pathlib import Path

import pytest

from toile.core.artifacts import fetch_patiently, patience, publish_folder
from toile.core.artifacts.local import LocalStore
from toile.core.errors import DataLossError, NotFoundError, StoreUnavailableError, ToileError


class FailingStore(LocalStore):
    """Raises what it is given, once each, before it reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.failures: list[ToileError] = []

    def get(self, key: str) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    made = FailingStore(tmp_path / "store")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("lace")
    publish_folder(made, "models/x", tmp_path / "folder")
    return made


def test_a_store_that_comes_back_is_read(store: FailingStore, tmp_path: Path) -> None:
    store.failures = [StoreUnavailableError("away"), StoreUnavailableError("still")]
    folder = fetch_patiently(store, "models/x", tmp_path / "cache")
    assert (folder / "a.txt").read_text() == "lace"
    assert not store.failures


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("there is none"),
        DataLossError("damaged"),
        StoreUnavailableError("not with these credentials", reason="STORE_DENIED"),
    ],
)
def test_what_will_not_change_is_told_at_once(
    store: FailingStore, tmp_path: Path, error: ToileError
) -> None:
    store.failures = [error, error]
    with pytest.raises(type(error)):
        fetch_patiently(store, "models/x", tmp_path / "cache")
    assert store.failures == [error]


def test_a_store_that_stays_away_is_given_up(
    store: FailingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    store.failures = [StoreUnavailableError("away")] * 100
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        fetch_patiently(store, "models/x", tmp_path / "cache")
    assert time.monotonic() - started < 10
    assert 1 < 100 - len(store.failures) < 100
