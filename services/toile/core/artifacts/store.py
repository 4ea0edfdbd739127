"""What an artifact store is: bytes under keys, each with its size and SHA-256.

A key is a relative path such as `projects/p/images/i.png`. No key may be a folder of another
(`a` beside `a/b`): folders on disk cannot hold that.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from toile.core.errors import InvalidArgumentError

CHUNK_BYTES = 1 << 20
MAX_KEY_BYTES = 900  # S3 takes 1,024; the rest is for a bucket's own prefixes
MAX_SEGMENT_BYTES = 250  # file systems take 255
STALE_SECONDS = 24 * 3600.0  # what is half written and untouched for so long has no writer
MAX_EXPIRES_SECONDS = 7 * 24 * 3600  # S3's own limit for signed links

Source = bytes | Path | BinaryIO


@dataclass(frozen=True)
class ArtifactInfo:
    """What is known of an artifact without reading it."""

    key: str
    size_bytes: int
    digest: str  # SHA-256, hexadecimal


class ArtifactStore(Protocol):
    """Bytes under keys.

    A key appears with all its bytes or not at all, whatever happens to the writer. Every method
    may raise `StoreUnavailableError`, those that take a key `InvalidArgumentError` for one that
    `check_key` refuses.
    """

    def put(
        self,
        key: str,
        data: Source,
        *,
        media_type: str = "application/octet-stream",
        if_absent: bool = False,
    ) -> ArtifactInfo:
        """Store bytes, a file, or all that is left in a stream, in bounded memory.

        Raises:
            AlreadyExistsError: The key is taken and `if_absent` was asked for.
            DiskFullError: There is no room.
        """
        ...

    def open(self, key: str) -> AbstractContextManager[BinaryIO]:
        """Open an artifact for reading as a stream.

        Raises:
            NotFoundError: There is none.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return a whole artifact.

        Raises:
            NotFoundError: There is none.
            DataLossError: The bytes are not those that were stored.
        """
        ...

    def stat(self, key: str) -> ArtifactInfo:
        """Return what is known of an artifact.

        Raises:
            NotFoundError: There is none.
        """
        ...

    def exists(self, key: str) -> bool:
        """Say whether there is an artifact."""
        ...

    def list(self, prefix: str) -> Iterator[ArtifactInfo]:
        """Return the artifacts whose keys begin with a prefix, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an artifact. One that is absent is no error."""
        ...

    def presigned_url(self, key: str, *, expires_seconds: int = 3600) -> str:
        """Return a URL that needs no other credentials, whether or not the artifact exists.

        An object store's link stops working after `expires_seconds` (1 s to 7 days). A folder
        has nobody to enforce that: its `file:` URL works for whoever may read the folder.
        """
        ...

    def check(self) -> None:
        """Return quickly if the store can be used.

        Raises:
            StoreUnavailableError: It cannot.
        """
        ...


def check_key(key: str) -> str:
    """Return `key` if a store can hold it.

    Raises:
        InvalidArgumentError: It is empty, absolute, too long, has a segment `.`, `..` or with
            spaces around it, or characters that are unprintable or a backslash.
    """
    segments = key.split("/")
    if (
        not key.isprintable()
        or "\\" in key
        or len(key.encode()) > MAX_KEY_BYTES
        or any(
            segment in {"", ".", ".."}
            or segment != segment.strip()
            or len(segment.encode()) > MAX_SEGMENT_BYTES
            for segment in segments
        )
    ):
        raise InvalidArgumentError(
            f"not a usable artifact key: {key[:80]!r}", reason="BAD_ARTIFACT_KEY"
        )
    return key


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that no key can begin with.

    Raises:
        InvalidArgumentError: See `check_key`.
    """
    check_key(f"{prefix}x")


def check_expiry(expires_seconds: int) -> None:
    """Refuse what no store can sign.

    Raises:
        InvalidArgumentError: It is not 1 s to 7 days.
    """
    if not 1 <= expires_seconds <= MAX_EXPIRES_SECONDS:
        raise InvalidArgumentError(
            f"a link may live 1 to {MAX_EXPIRES_SECONDS} seconds, not {expires_seconds}",
            field="expires_seconds",
        )


def chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Read a stream piece by piece."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


@contextlib.contextmanager
def reading(data: Source) -> Iterator[BinaryIO]:
    """Open what `put` was given as a stream; only a file opened here is closed again.

    Raises:
        OSError: A file that cannot be opened.
    """
    if isinstance(data, bytes):
        yield io.BytesIO(data)
    elif isinstance(data, Path):
        with data.open("rb") as stream:
            yield stream
    else:
        yield data


def sha256(data: bytes | Path) -> tuple[str, int]:
    """Return the hexadecimal digest and the size in bytes."""
    digest, size_bytes = hashlib.sha256(), 0
    with reading(data) as stream:
        for chunk in chunks(stream):
            digest.update(chunk)
            size_bytes += len(chunk)
    return digest.hexdigest(), size_bytes
