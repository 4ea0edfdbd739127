"""What is particular to artifacts in a folder."""

import os
import shutil
import time
from pathlib import Path

import pytest

from toile.core.artifacts.local import LocalStore
from toile.core.errors import DataLossError, InvalidArgumentError, StoreUnavailableError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root)


def test_files_are_plain_and_found_again_by_another_process(store: LocalStore, root: Path) -> None:
    put = store.put("projects/p/images/i.png", b"pixels")
    assert (root / "objects/projects/p/images/i.png").read_bytes() == b"pixels"
    assert LocalStore(root).stat("projects/p/images/i.png") == put


def test_bytes_that_rotted_are_not_given_out(store: LocalStore, root: Path) -> None:
    put = store.put("k", b"good")
    file = root / "objects/k"
    before = file.stat()
    file.write_bytes(b"evil")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataLossError):
        store.get("k")
    # The digest is the one of what was stored; listing does not read the files.
    assert list(store.list("")) == [put]


def test_a_file_replaced_by_hand_gets_its_own_digest(store: LocalStore, root: Path) -> None:
    put = store.put("k", b"first")
    (root / "objects/k").write_bytes(b"other")
    assert store.get("k") == b"other"
    assert store.stat("k").digest != put.digest


def test_a_lost_digest_is_computed_and_kept(store: LocalStore, root: Path) -> None:
    put = store.put("a/k", b"bytes")
    (root / "digests/a/k").unlink()
    assert store.stat("a/k") == put
    assert (root / "digests/a/k").exists()


def test_a_digest_survives_a_copy_that_keeps_times(store: LocalStore, root: Path) -> None:
    put = store.put("k", b"bytes")
    shutil.copytree(root, root.with_name("copy"))
    assert list(LocalStore(root.with_name("copy")).list("")) == [put]


def test_leftovers_of_dead_writers_are_never_listed_and_go_in_time(
    store: LocalStore, root: Path
) -> None:
    for name in ("old", "new"):
        (root / "temporary" / name).write_bytes(b"half")
    os.utime(root / "temporary/old", (0, time.time() - 2 * 24 * 3600))
    assert list(store.list("")) == []
    LocalStore(root)
    assert [path.name for path in (root / "temporary").iterdir()] == ["new"]


def test_a_failing_source_leaves_nothing(store: LocalStore, root: Path) -> None:
    class Failing:
        def read(self, size: int) -> bytes:
            raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        store.put("k", Failing())  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        store.put("k", root / "no such file")
    assert list(store.list("")) == []
    assert list((root / "temporary").iterdir()) == []


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_key_cannot_be_a_folder_of_another(store: LocalStore, if_absent: bool) -> None:
    store.put("a/b", b"x")
    for key in ("a", "a/b/c"):
        with pytest.raises(InvalidArgumentError):
            store.put(key, b"y", if_absent=if_absent)
    assert [each.key for each in store.list("")] == ["a/b"]


def test_a_disk_that_is_not_mounted_is_not_written_into(store: LocalStore, root: Path) -> None:
    root.rename(root.with_name("away"))
    with pytest.raises(StoreUnavailableError):
        store.put("k", b"x")
    assert not root.exists()


def test_a_place_where_no_folder_can_be_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailableError):
        LocalStore(tmp_path / "file" / "artifacts")
