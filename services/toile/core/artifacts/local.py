"""Artifacts in a folder, as plain files that other programs can read.

    objects/…      the artifacts, each under its key
    digests/…      for each key the SHA-256 of the file with that size and modification time
    temporary/…    what is being written

A file is written under `temporary`, flushed to the disk and then renamed (or, where the key
must be free, linked) into place. Its digest is recorded right after; should the process die
between the two, or somebody replace the file by hand, the record does not fit the file any
more and the next look at the key reads the file once and records its digest anew.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from toile.core.artifacts.store import (
    STALE_SECONDS,
    ArtifactInfo,
    Source,
    check_expiry,
    check_key,
    check_prefix,
    chunks,
    reading,
)
from toile.core.errors import (
    AlreadyExistsError,
    DataLossError,
    DiskFullError,
    InvalidArgumentError,
    NotFoundError,
    StoreUnavailableError,
)


@dataclass(frozen=True)
class _Written:
    """A temporary file, complete and on the disk."""

    digest: str
    size_bytes: int
    modified_ns: int


class LocalStore:
    """An `ArtifactStore` in a folder."""

    def __init__(self, root: Path) -> None:
        """Make the folder if need be, and clear away what dead writers left behind.

        Raises:
            StoreUnavailableError: The folder cannot be made.
        """
        self._root = root
        self._objects = root / "objects"
        self._digests = root / "digests"
        self._temporary = root / "temporary"
        with _translated(root):
            for folder in (self._objects, self._digests, self._temporary):
                folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def put(
        self,
        key: str,
        data: Source,
        *,
        media_type: str = "application/octet-stream",  # noqa: ARG002 - a file has none
        if_absent: bool = False,
    ) -> ArtifactInfo:
        """See `ArtifactStore.put`."""
        destination = self._objects / check_key(key)
        if if_absent and destination.is_file():
            raise _taken(key)
        temporary = self._temporary / uuid.uuid4().hex
        try:
            with reading(data) as source:
                written = self._write(temporary, source)
            with _translated(self._root, key):
                self._make_folder(destination.parent)
                _place(temporary, destination, key, if_absent=if_absent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._record(key, written)
        return ArtifactInfo(key, written.size_bytes, written.digest)

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """See `ArtifactStore.open`."""
        path = self._objects / check_key(key)
        try:
            stream = path.open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._missing(key) from None
        except OSError as error:
            raise _unavailable(self._root, error) from error
        with stream:
            yield stream

    def get(self, key: str) -> bytes:
        """See `ArtifactStore.get`."""
        with self.open(key) as stream:
            with _translated(self._root):
                data = stream.read()
            recorded = self._recorded(key, os.fstat(stream.fileno()))
        if recorded is not None and recorded != hashlib.sha256(data).hexdigest():
            raise DataLossError(f"artifact {key} does not match its digest")
        return data

    def stat(self, key: str) -> ArtifactInfo:
        """See `ArtifactStore.stat`."""
        with self.open(key) as stream:
            status = os.fstat(stream.fileno())
            digest = self._recorded(key, status)
            if digest is None:
                digest = self._rehash(key, stream, status)
        return ArtifactInfo(key, status.st_size, digest)

    def exists(self, key: str) -> bool:
        """See `ArtifactStore.exists`."""
        if (self._objects / check_key(key)).is_file():
            return True
        self._require()
        return False

    def list(self, prefix: str) -> Iterator[ArtifactInfo]:
        """See `ArtifactStore.list`."""
        check_prefix(prefix)
        folder, _, stem = prefix.rpartition("/")
        start = self._objects / folder
        self._require()
        for key in self._walk(start, f"{folder}/" if folder else "", stem):
            with contextlib.suppress(NotFoundError):  # deleted meanwhile
                yield self.stat(key)

    def delete(self, key: str) -> None:
        """See `ArtifactStore.delete`."""
        path = self._objects / check_key(key)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._require()
        except OSError as error:
            raise _unavailable(self._root, error) from error
        with contextlib.suppress(OSError):
            (self._digests / key).unlink()

    def presigned_url(self, key: str, *, expires_seconds: int = 3600) -> str:
        """Return a `file:` URL; see `ArtifactStore.presigned_url` on what it cannot promise."""
        check_expiry(expires_seconds)
        return (self._objects / check_key(key)).absolute().as_uri()

    def check(self) -> None:
        """See `ArtifactStore.check`."""
        self._require()
        if not os.access(self._temporary, os.W_OK | os.X_OK):
            raise StoreUnavailableError(f"the artifact folder {self._root} cannot be written")

    def _require(self) -> None:
        """Tell a missing file from a missing store, such as a disk that is not mounted."""
        with _translated(self._root):
            self._objects.stat()

    def _write(self, temporary: Path, source: BinaryIO) -> _Written:
        digest = hashlib.sha256()
        with _translated(self._root):
            sink = temporary.open("xb", buffering=0)
        with sink:
            for chunk in chunks(source):
                digest.update(chunk)
                with _translated(self._root):
                    _write_all(sink.fileno(), chunk)
            with _translated(self._root):
                # The kernel's own time is a few milliseconds coarse; two versions of a file must
                # differ in it even when they were written at once.
                stamp = time.time_ns()
                os.utime(sink.fileno(), ns=(stamp, stamp))
                os.fsync(sink.fileno())
                status = os.fstat(sink.fileno())
        return _Written(digest.hexdigest(), status.st_size, status.st_mtime_ns)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder below `objects`, which must exist, durably."""
        if folder == self._objects or folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)

    def _record(self, key: str, written: _Written) -> None:
        """Remember a digest. Failing is harmless: it is then computed again when needed."""
        path = self._digests / key
        temporary = self._temporary / uuid.uuid4().hex
        record = {
            "digest": written.digest,
            "size_bytes": written.size_bytes,
            "modified_ns": written.modified_ns,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(record))
            if path.is_dir():  # from when the key was a folder's
                shutil.rmtree(path)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _recorded(self, key: str, status: os.stat_result) -> str | None:
        """Return the digest recorded for exactly this state of a file."""
        try:
            record = json.loads((self._digests / key).read_text())
            fits = (record["size_bytes"], record["modified_ns"]) == (
                status.st_size,
                status.st_mtime_ns,
            )
            return str(record["digest"]) if fits else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _rehash(self, key: str, stream: BinaryIO, status: os.stat_result) -> str:
        digest = hashlib.sha256()
        with _translated(self._root):
            for chunk in chunks(stream):
                digest.update(chunk)
        written = _Written(digest.hexdigest(), status.st_size, status.st_mtime_ns)
        self._record(key, written)
        return written.digest

    def _walk(self, folder: Path, prefix: str, stem: str) -> Iterator[str]:
        """Return keys in the order of their characters, which is not that of nested folders."""
        try:
            with os.scandir(folder) as entries:
                names = sorted(
                    f"{entry.name}/" if entry.is_dir() else entry.name
                    for entry in entries
                    if entry.name.startswith(stem)
                )
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _unavailable(self._root, error) from error
        for name in names:
            if name.endswith("/"):
                yield from self._walk(folder / name, prefix + name, "")
            else:
                yield prefix + name

    def _missing(self, key: str) -> NotFoundError:
        """Return the error for a key without a file, once it is sure that the store is there."""
        self._require()
        return NotFoundError(f"there is no artifact {key}", reason="ARTIFACT_NOT_FOUND")

    def _sweep(self) -> None:
        limit = time.time() - STALE_SECONDS
        for path in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer is alive after all
                if path.stat().st_mtime < limit:
                    path.unlink()


def _place(temporary: Path, destination: Path, key: str, *, if_absent: bool) -> None:
    """Give a complete file its key, durably."""
    if destination.is_dir():
        _remove_empty(destination, key)
    if if_absent:
        try:
            os.link(temporary, destination)
        except FileExistsError:
            raise _taken(key) from None
    else:
        temporary.replace(destination)
    _sync_folder(destination.parent)


def _remove_empty(folder: Path, key: str) -> None:
    """Remove a folder that deleted artifacts left behind."""
    try:
        for path, _, _ in os.walk(folder, topdown=False):
            Path(path).rmdir()
    except OSError as error:
        raise _folder(key) from error


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(root: Path, key: str | None = None) -> Iterator[None]:
    """Turn the operating system's errors into Toile's; `key` is the one that is being placed."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(f"no space is left in {root}") from error
        if key is not None and error.errno in {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
            raise _folder(key) from error
        raise _unavailable(root, error) from error


def _unavailable(root: Path, error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(f"the artifact folder {root} cannot be used: {error.strerror}")


def _taken(key: str) -> AlreadyExistsError:
    return AlreadyExistsError(f"there is already an artifact {key}", reason="ARTIFACT_EXISTS")


def _folder(key: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{key} would be both an artifact and a folder of artifacts", reason="BAD_ARTIFACT_KEY"
    )
