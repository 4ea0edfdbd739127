"""Publishing and fetching folders, and what is left when things go wrong, on every store."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from toile.core.artifacts import (
    ArtifactStore,
    fetch,
    open_store,
    publish,
    publish_folder,
    publish_stored,
    read_manifest,
)
from toile.core.errors import (
    AlreadyExistsError,
    DataLossError,
    DiskFullError,
    InvalidArgumentError,
    NotFoundError,
)
from toile.core.settings import Settings

from .conftest import Place

PREFIX = "projects/p/datasets/d/versions/1/job"
FILES: dict[str, bytes | Path] = {
    "images/1.png": b"one",
    "images/2.png": b"two" * 1000,
    "metadata.jsonl": b"{}\n",
    "empty": b"",
}
METADATA = {"trigger_word": "<lace>", "resolution": 128, "figures": [1, 2.5, None, {"é": True}]}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_files_that_were_put_one_by_one_are_published_as_they_are(
    store: ArtifactStore, tmp_path: Path
) -> None:
    store.put(f"{PREFIX}/1", b"one")
    with pytest.raises(NotFoundError):
        publish_stored(store, PREFIX, ["1", "2"])
    store.put(f"{PREFIX}/2", b"two")
    with pytest.raises(NotFoundError):
        fetch(store, PREFIX, tmp_path)
    published = publish_stored(store, PREFIX, ["1", "2"])
    assert contents(fetch(store, PREFIX, tmp_path)) == {"1": b"one", "2": b"two"}
    assert publish_stored(store, PREFIX, ["1", "2"]) == published
    assert publish(store, PREFIX, {"1": b"one", "2": b"two"}) == published
    with pytest.raises(AlreadyExistsError):
        publish_stored(store, PREFIX, ["1"])


def test_publishes_and_fetches(store: ArtifactStore, tmp_path: Path) -> None:
    published = publish(store, PREFIX, FILES, METADATA)

    assert read_manifest(store, PREFIX) == published
    assert published.metadata == METADATA
    assert set(published.files) == set(FILES)
    for name, data in FILES.items():
        assert store.get(published.key(PREFIX, name)) == data
    with pytest.raises(NotFoundError):
        published.key(PREFIX, "images/3.png")

    folder = fetch(store, PREFIX, tmp_path / "cache")
    assert folder == tmp_path / "cache" / published.digest
    assert contents(folder) == FILES


def test_publishes_a_folder(store: ArtifactStore, tmp_path: Path) -> None:
    for name, data in FILES.items():
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(data))  # type: ignore[arg-type]
    published = publish_folder(store, PREFIX, tmp_path / "made", METADATA)
    assert published == publish(store, PREFIX, FILES, METADATA)


def test_fetching_again_needs_no_download(store: ArtifactStore, tmp_path: Path) -> None:
    published = publish(store, PREFIX, FILES)
    first = fetch(store, PREFIX, tmp_path)
    store.delete(published.key(PREFIX, "images/1.png"))
    assert fetch(store, PREFIX, tmp_path) == first


def test_the_same_content_twice_is_one_publication(store: ArtifactStore) -> None:
    first = publish(store, PREFIX, FILES, METADATA)
    before = list(store.list(""))
    assert publish(store, PREFIX, dict(reversed(FILES.items())), METADATA) == first
    assert list(store.list("")) == before


@pytest.mark.parametrize("change", ["file", "name", "metadata"])
def test_other_content_is_refused_and_changes_nothing(store: ArtifactStore, change: str) -> None:
    first = publish(store, PREFIX, FILES, METADATA)
    before = list(store.list(""))
    other = {
        "file": (FILES | {"images/1.png": b"ONE"}, METADATA),
        "name": (FILES | {"images/3.png": b"three"}, METADATA),
        "metadata": (FILES, METADATA | {"resolution": 256}),
    }[change]
    with pytest.raises(AlreadyExistsError):
        publish(store, PREFIX, *other)
    assert read_manifest(store, PREFIX) == first
    assert list(store.list("")) == before


@pytest.mark.parametrize(
    "files",
    [{"../x": b""}, {"manifest.json": b""}, {"a": b"", "a/b": b""}, {"": b""}, {"/a": b""}],
    ids=str,
)
def test_refuses_names_that_a_folder_cannot_hold(
    store: ArtifactStore, files: dict[str, bytes]
) -> None:
    with pytest.raises(InvalidArgumentError):
        publish(store, PREFIX, files)
    assert list(store.list("")) == []


class Crashed(BaseException):
    """A crash, as far as the store can tell."""


class CrashingStore:
    """A store whose process dies just before the manifest is written."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put(self, key: str, *args: object, **options: object) -> object:
        if key.endswith("manifest.json"):
            raise Crashed
        return self._store.put(key, *args, **options)  # type: ignore[arg-type]


def test_a_crash_before_the_manifest_publishes_nothing(
    store: ArtifactStore, tmp_path: Path
) -> None:
    with pytest.raises(Crashed):
        publish(CrashingStore(store), PREFIX, FILES)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        read_manifest(store, PREFIX)
    with pytest.raises(NotFoundError):
        fetch(store, PREFIX, tmp_path / "cache")

    # The next attempt made other bytes of one file, and goes through all the same.
    second = FILES | {"images/1.png": b"ONE"}
    published = publish(store, PREFIX, second)
    assert store.get(published.key(PREFIX, "images/1.png")) == b"ONE"
    assert contents(fetch(store, PREFIX, tmp_path / "cache")) == second
    assert publish(store, PREFIX, second) == published


def test_of_racing_publishers_one_wins(store: ArtifactStore, tmp_path: Path) -> None:
    racers = 3
    for round_ in range(2):
        barrier, prefix = Barrier(racers), f"{PREFIX}{round_}"

        def contents_of(number: int) -> dict[str, bytes | Path]:
            return {f"{name}.bin": bytes([number]) * 100 for name in "abc"} | {"same": b"same"}

        def race(number: int, prefix: str = prefix, barrier: Barrier = barrier) -> bool:
            barrier.wait()
            try:
                publish(store, prefix, contents_of(number), {"publisher": number})
            except AlreadyExistsError:
                return False
            return True

        with ThreadPoolExecutor(racers) as pool:
            won = list(pool.map(race, range(racers)))
        assert sum(won) == 1
        winner = won.index(True)
        assert read_manifest(store, prefix).metadata == {"publisher": winner}
        assert contents(fetch(store, prefix, tmp_path)) == contents_of(winner)


@pytest.mark.parametrize("damage", ["altered", "gone", "truncated"])
def test_damage_is_noticed_and_nothing_is_cached(
    store: ArtifactStore, tmp_path: Path, damage: str
) -> None:
    published = publish(store, PREFIX, FILES)
    key = published.key(PREFIX, "images/2.png")
    if damage == "gone":
        store.delete(key)
    else:
        store.put(key, b"TWO" * 1000 if damage == "altered" else b"two")
    with pytest.raises(DataLossError):
        fetch(store, PREFIX, tmp_path)
    assert list(tmp_path.glob(f"{published.digest}*")) == []
    assert list(tmp_path.glob("partial-*")) == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format":2,"files":{},"metadata":{}}'])
def test_a_damaged_manifest_is_data_loss(store: ArtifactStore, data: bytes) -> None:
    store.put(f"{PREFIX}/manifest.json", data)
    with pytest.raises(DataLossError):
        read_manifest(store, PREFIX)


# What child processes begin with: the store that the parent's settings name.
OPEN_STORE = """
import sys
from pathlib import Path
from toile.core.artifacts import fetch, open_store
from toile.core.settings import Settings
settings = Settings.model_validate_json(sys.stdin.readline())
"""
FETCHER = OPEN_STORE + "print(fetch(open_store(settings), sys.argv[1], Path(sys.argv[2])))"


def start_child(script: str, settings: Settings, *arguments: str) -> subprocess.Popen[str]:
    plain = settings.model_dump(mode="json")
    plain["s3"]["secret_key"] = settings.s3.secret_key.get_secret_value()
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(plain) + "\n")
    child.stdin.flush()
    return child


def test_processes_may_fetch_at_once(place: Place, store: ArtifactStore, tmp_path: Path) -> None:
    files: dict[str, bytes | Path] = {f"{n}.bin": os.urandom(200_000) for n in range(10)}
    publish(store, PREFIX, files)
    cache = tmp_path / "cache"
    children = [start_child(FETCHER, place.settings, PREFIX, str(cache)) for _ in range(3)]
    folders = {child.communicate()[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(folders) == 1
    assert contents(Path(folders.pop())) == files
    assert len(list(cache.iterdir())) == 1


# Puts 40 MB under a key and says "half" once about half of it has left the process.
SLOW_WRITER = (
    OPEN_STORE
    + """
import io, time
sent = 0
class Slow:
    def read(self, size=-1):
        global sent
        if sent > 20 << 20:
            print("half", flush=True)
            time.sleep(600)
        chunk = super().read(size)
        sent += len(chunk)
        return chunk
if settings.artifacts_url == "s3":
    # A stream is spooled before the first byte is sent; what is slow here is the sending.
    from toile.core.artifacts import s3
    s3._Upload = type("SlowUpload", (Slow, s3._Upload), {})
    source = bytes(40 << 20)
else:
    source = type("SlowStream", (Slow, io.BytesIO), {})(bytes(40 << 20))
open_store(settings).put("models/large", source)
"""
)


def test_a_writer_that_is_killed_leaves_nothing_to_see(place: Place) -> None:
    open_store(place.settings).check()
    with start_child(SLOW_WRITER, place.settings) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.kill()

    store = open_store(place.settings)
    assert list(store.list("")) == []
    assert not store.exists("models/large")
    assert store.put("models/large", b"whole", if_absent=True).size_bytes == 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no full disk: this user may not mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_cache_is_said_and_left_empty(
    store: ArtifactStore, tmp_path: Path, small_disk: Path
) -> None:
    publish(store, PREFIX, FILES | {"large": bytes(6 << 20)})
    with pytest.raises(DiskFullError):
        fetch(store, PREFIX, small_disk / "cache")
    assert contents(small_disk) == {}
    publish(store, "small", FILES)
    assert contents(fetch(store, "small", small_disk / "cache")) == FILES


def test_a_full_disk_is_said_and_loses_nothing(place: Place, small_disk: Path) -> None:
    if place.settings.artifacts_url == "s3":
        pytest.skip("the server's disk is the server's; see the unit tests for its answer")
    store = open_store(Settings(artifacts_url=small_disk.as_uri()))
    store.put("old", b"old")
    for if_absent in (False, True):
        with pytest.raises(DiskFullError):
            store.put("new", bytes(6 << 20), if_absent=if_absent)
    with pytest.raises(DiskFullError):
        store.put("old", bytes(6 << 20))
    with pytest.raises(DiskFullError):
        publish(store, PREFIX, {"a": bytes(1 << 20), "b": bytes(6 << 20)})
    store.check()
    assert store.get("old") == b"old"
    with pytest.raises(NotFoundError):
        read_manifest(store, PREFIX)
    store.put("new", bytes(1 << 20))


def test_what_dead_fetchers_left_is_cleared_away(store: ArtifactStore, tmp_path: Path) -> None:
    for name in ("partial-old", "partial-new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "partial-old", (0, time.time() - 2 * 24 * 3600))
    publish(store, PREFIX, FILES)
    fetch(store, PREFIX, tmp_path)
    assert [path.name for path in tmp_path.glob("partial-*")] == ["partial-new"]
