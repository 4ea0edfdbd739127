"""Publishing many files as one: the manifest is written last, and what has none is not there.

    {prefix}/{name}              the files
    {prefix}/manifest.json       their sizes and digests, and what the publisher says of them

No file is ever overwritten. Where an attempt that died (or a rival that is still writing) left
other bytes under a name, the file goes to `{prefix}/attempt-{id}/{name}` and the manifest says
so: therefore read a file at `Manifest.key(prefix, name)`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from toile.core.artifacts.store import ArtifactInfo, ArtifactStore, check_key, sha256
from toile.core.context import new_id
from toile.core.errors import (
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
)

MANIFEST = "manifest.json"
_UPLOADS = 8  # at once; hides an object store's latency for folders of small files


@dataclass(frozen=True)
class FileEntry:
    """One published file. `attempt` is the folder it went to when its own key was taken."""

    size_bytes: int
    digest: str
    attempt: str = ""


@dataclass(frozen=True)
class Manifest:
    """What was published under a prefix."""

    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the names, sizes and digests of the files, and the metadata."""
        content = {
            "files": {name: [e.size_bytes, e.digest] for name, e in self.files.items()},
            "metadata": self.metadata,
        }
        return hashlib.sha256(_canonical(content)).hexdigest()

    def key(self, prefix: str, name: str) -> str:
        """Return the key of a file.

        Raises:
            NotFoundError: No such file was published.
        """
        entry = self.files.get(name)
        if entry is None:
            raise NotFoundError(f"{prefix} holds no file {name}", reason="ARTIFACT_NOT_FOUND")
        return "/".join(part for part in (prefix, entry.attempt, name) if part)

    def to_json(self) -> bytes:
        """Return the manifest file's bytes."""
        files = {
            name: {"size_bytes": e.size_bytes, "digest": e.digest}
            | ({"attempt": e.attempt} if e.attempt else {})
            for name, e in self.files.items()
        }
        return _canonical({"format": 1, "files": files, "metadata": self.metadata})

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read a manifest file.

        Raises:
            DataLossError: It is not one, or names files that no store can hold.
        """
        try:
            document = _Document.model_validate_json(data)
            for name, entry in document.files.items():
                _check_name(name)
                if entry.attempt:
                    check_key(entry.attempt)
        except (ValidationError, InvalidArgumentError) as error:
            raise DataLossError(f"not a manifest: {error}", reason="BAD_MANIFEST") from error
        return cls(
            {n: FileEntry(e.size_bytes, e.digest, e.attempt) for n, e in document.files.items()},
            document.metadata,
        )


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    size_bytes: NonNegativeInt
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    attempt: str = ""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Annotated[int, Field(ge=1, le=1)]
    files: dict[str, _Entry]
    metadata: dict[str, Any]


def publish(
    store: ArtifactStore,
    prefix: str,
    files: Mapping[str, bytes | Path],
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Store files and, last of all, the manifest that makes them count.

    The same content may be published again, which does nothing. Of several publishers with
    different content exactly one wins. Metadata is what JSON can hold.

    Raises:
        AlreadyExistsError: Other content is published there.
        InvalidArgumentError: A name cannot be a key, or is a folder of another.
    """
    check_key(prefix)
    _check_names(files)
    entries = {name: FileEntry(size, digest) for name, digest, size in _digests(files)}
    wanted = Manifest(entries, json.loads(_canonical(metadata or {})))
    published = _published(store, prefix)
    if published is None:
        return _seal(store, prefix, _upload(store, prefix, files, wanted))
    _check_same(published, wanted, prefix)
    return published


def publish_stored(
    store: ArtifactStore,
    prefix: str,
    names: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make files count that were put under a prefix one by one, whoever put them there.

    Raises:
        NotFoundError: One is not there.
        AlreadyExistsError: Other content is published there.
        InvalidArgumentError: A name cannot be a key.
    """
    check_key(prefix)
    entries = {}
    for name in names:
        _check_name(name)
        info = store.stat(f"{prefix}/{name}")
        entries[name] = FileEntry(info.size_bytes, info.digest)
    return _seal(store, prefix, Manifest(entries, json.loads(_canonical(metadata or {}))))


def _seal(store: ArtifactStore, prefix: str, wanted: Manifest) -> Manifest:
    """Write the manifest, or find the same one written by another."""
    try:
        store.put(
            f"{prefix}/{MANIFEST}",
            wanted.to_json(),
            media_type="application/json",
            if_absent=True,
        )
    except AlreadyExistsError:
        published = read_manifest(store, prefix)
        _check_same(published, wanted, prefix)
        return published
    return wanted


def _check_same(published: Manifest, wanted: Manifest, prefix: str) -> None:
    if published.digest != wanted.digest:
        raise AlreadyExistsError(f"other content is published at {prefix}")


def publish_folder(
    store: ArtifactStore, prefix: str, folder: Path, metadata: Mapping[str, Any] | None = None
) -> Manifest:
    """Publish all files of a folder and its subfolders; see `publish`."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return publish(store, prefix, files, metadata)


def read_manifest(store: ArtifactStore, prefix: str) -> Manifest:
    """Return what was published under a prefix.

    Raises:
        NotFoundError: Nothing was.
        DataLossError: The manifest is damaged.
    """
    try:
        return Manifest.from_json(store.get(f"{prefix}/{MANIFEST}"))
    except NotFoundError:
        raise NotFoundError(
            f"nothing is published at {prefix}", reason="ARTIFACT_NOT_FOUND"
        ) from None


def delete_folder(store: ArtifactStore, prefix: str) -> None:
    """Remove a published folder, its manifest first, so that nobody sees half of it."""
    keys = [info.key for info in store.list(prefix + "/")]
    for key in sorted(keys, key=lambda key: not key.endswith("/" + MANIFEST)):
        store.delete(key)


def _published(store: ArtifactStore, prefix: str) -> Manifest | None:
    try:
        return read_manifest(store, prefix)
    except NotFoundError:
        return None


def _digests(files: Mapping[str, bytes | Path]) -> list[tuple[str, str, int]]:
    return [(name, *sha256(data)) for name, data in sorted(files.items())]


def _upload(
    store: ArtifactStore, prefix: str, files: Mapping[str, bytes | Path], wanted: Manifest
) -> Manifest:
    """Store the files and return the manifest with the places they found."""
    attempt = f"attempt-{new_id()}"

    def place(name: str) -> tuple[str, FileEntry]:
        entry = wanted.files[name]
        if not _place(store, f"{prefix}/{name}", files[name], entry.digest):
            entry = FileEntry(entry.size_bytes, entry.digest, attempt)
            info = store.put(f"{prefix}/{attempt}/{name}", files[name], if_absent=True)
            _check_unchanged(info, entry.digest)
        return name, entry

    with ThreadPoolExecutor(max_workers=_UPLOADS) as pool:
        return Manifest(dict(pool.map(place, wanted.files)), wanted.metadata)


def _place(store: ArtifactStore, key: str, data: bytes | Path, digest: str) -> bool:
    """Store a file under its own key, and say whether these very bytes are there now."""
    try:
        # A look first spares sending again what an earlier attempt got through.
        return store.stat(key).digest == digest
    except NotFoundError:
        pass
    try:
        info = store.put(key, data, if_absent=True)
    except AlreadyExistsError:
        return store.stat(key).digest == digest
    _check_unchanged(info, digest)
    return True


def _check_unchanged(info: ArtifactInfo, digest: str) -> None:
    if info.digest != digest:
        raise DataLossError(f"{info.key} changed while it was being published")


def _check_name(name: str) -> None:
    check_key(name)
    if name == MANIFEST:
        raise InvalidArgumentError(f"a published file cannot be called {MANIFEST}")


def _check_names(files: Mapping[str, bytes | Path]) -> None:
    for name in files:
        _check_name(name)
        parts = name.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in files:
                raise InvalidArgumentError(f"{name} lies in a folder that is also a file")


def _canonical(value: object) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
