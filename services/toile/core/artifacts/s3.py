"""Artifacts in MinIO or another S3 server.

The SHA-256 of an artifact is kept in its user metadata, which must be known before the first
byte is sent; so files are read twice, and streams are spooled to the local disk first.
"""

import contextlib
import errno
import hashlib
import io
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error, ServerError

from toile.core.artifacts.store import (
    CHUNK_BYTES,
    ArtifactInfo,
    Source,
    check_expiry,
    check_key,
    check_prefix,
    chunks,
    sha256,
)
from toile.core.errors import (
    AlreadyExistsError,
    DataLossError,
    DiskFullError,
    NotFoundError,
    StoreUnavailableError,
    ToileError,
)
from toile.core.settings import S3Settings

PART_BYTES = 8 << 20  # sent at once; anything larger goes up in parts
CONNECT_SECONDS = 3.0
READ_SECONDS = 20.0
PROBE_SECONDS = 2.0
_DIGEST = "x-amz-meta-sha256"
_ABSENT = {"NoSuchKey", "NoSuchBucket", "NoSuchObject", "NoSuchVersion"}
_TAKEN = {"PreconditionFailed", "ConditionalRequestConflict"}
_FULL = {
    "XMinioStorageFull",
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class S3Store:
    """An `ArtifactStore` in one bucket, which is made when it is missing."""

    def __init__(self, settings: S3Settings) -> None:
        """Connects to nothing yet."""
        self._bucket = settings.bucket
        self._region = settings.region
        self._client = _client(Minio, settings, _patient())
        self._absent_only = _client(_CreateOnlyMinio, settings, _patient())
        self._probe = _client(Minio, settings, _impatient())

    def put(
        self,
        key: str,
        data: Source,
        *,
        media_type: str = "application/octet-stream",
        if_absent: bool = False,
    ) -> ArtifactInfo:
        """See `ArtifactStore.put`."""
        check_key(key)
        client = self._absent_only if if_absent else self._client
        with _prepared(data) as (stream, digest, size_bytes), _translated(key):
            try:
                _upload(client, self._bucket, key, stream, digest, size_bytes, media_type)
            except S3Error as error:
                if error.code != "NoSuchBucket":
                    raise
                self._make_bucket(self._client)
                stream.seek(0)
                _upload(client, self._bucket, key, stream, digest, size_bytes, media_type)
        return ArtifactInfo(key, size_bytes, digest)

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """See `ArtifactStore.open`."""
        check_key(key)
        with _translated(key):
            response = self._client.get_object(self._bucket, key)
        try:
            yield cast("BinaryIO", io.BufferedReader(_Download(response, key), CHUNK_BYTES))
        finally:
            # Closing, not draining: a reader that stops early may leave gigabytes unread.
            response.close()
            response.release_conn()

    def get(self, key: str) -> bytes:
        """See `ArtifactStore.get`."""
        check_key(key)
        with _translated(key):
            response = self._client.get_object(self._bucket, key)
            try:
                data: bytes = response.read()
            finally:
                response.close()
                response.release_conn()
        recorded = response.headers.get(_DIGEST)
        if recorded is not None and recorded != hashlib.sha256(data).hexdigest():
            raise DataLossError(f"artifact {key} does not match its digest")
        return data

    def stat(self, key: str) -> ArtifactInfo:
        """See `ArtifactStore.stat`."""
        check_key(key)
        with _translated(key):
            found = self._client.stat_object(self._bucket, key)
        return self._info(key, found.size, found.metadata)

    def exists(self, key: str) -> bool:
        """See `ArtifactStore.exists`."""
        try:
            self.stat(key)
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[ArtifactInfo]:
        """See `ArtifactStore.list`."""
        check_prefix(prefix)
        with contextlib.suppress(NotFoundError), _translated(prefix):
            found = self._client.list_objects(
                # MinIO gives metadata with the listing; elsewhere each object is asked for.
                self._bucket,
                prefix=prefix,
                recursive=True,
                include_user_meta=True,
            )
            for entry in found:
                with contextlib.suppress(NotFoundError):  # deleted meanwhile
                    yield self._info(entry.object_name, entry.size, entry.metadata)

    def delete(self, key: str) -> None:
        """See `ArtifactStore.delete`."""
        check_key(key)
        with contextlib.suppress(NotFoundError), _translated(key):
            self._client.remove_object(self._bucket, key)

    def presigned_url(self, key: str, *, expires_seconds: int = 3600) -> str:
        """See `ArtifactStore.presigned_url`."""
        check_key(key)
        check_expiry(expires_seconds)
        url: str = self._client.presigned_get_object(
            self._bucket, key, expires=timedelta(seconds=expires_seconds)
        )
        return url

    def check(self) -> None:
        """See `ArtifactStore.check`."""
        with _translated(self._bucket):
            if not self._probe.bucket_exists(self._bucket):
                self._make_bucket(self._probe)

    def _make_bucket(self, client: Minio) -> None:
        try:
            client.make_bucket(self._bucket, location=self._region)
        except S3Error as error:
            if error.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise

    def _info(self, key: str, size_bytes: int, metadata: Mapping[str, str] | None) -> ArtifactInfo:
        digest = _digest(metadata)
        if digest is None:
            with _translated(key):
                digest = _digest(self._client.stat_object(self._bucket, key).metadata)
        if digest is None:  # put there by another program
            hasher = hashlib.sha256()
            with self.open(key) as stream:
                for chunk in chunks(stream):
                    hasher.update(chunk)
            digest = hasher.hexdigest()
        return ArtifactInfo(key, size_bytes, digest)


class _CreateOnlyMinio(Minio):  # type: ignore[misc] # the library has no annotations we can see
    """A client whose `put_object` makes new objects only.

    S3 takes the condition with the request that makes an object appear, which is the only PUT
    of a small one and the last POST of one sent in parts; `put_object` has no parameter for it.
    """

    def _execute(self, method: str, *args: Any, **options: Any) -> Any:
        query = options.get("query_params") or {}
        appears = (method == "PUT" and "partNumber" not in query) or (
            method == "POST" and "uploadId" in query
        )
        if appears:
            options["headers"] = {**(options.get("headers") or {}), "If-None-Match": "*"}
        return super()._execute(method, *args, **options)


class _Upload(io.RawIOBase):
    """A stream that ends in an error, not in its last byte, if it is not what was announced."""

    def __init__(self, source: BinaryIO, key: str, digest: str, size_bytes: int) -> None:
        self._source = source
        self._key = key
        self._digest = digest
        self._left = size_bytes
        self._hasher = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(min(size, self._left) if size >= 0 else self._left)
        self._hasher.update(chunk)
        self._left -= len(chunk)
        short = not chunk and self._left
        if short or (not self._left and self._hasher.hexdigest() != self._digest):
            raise DataLossError(f"the source of {self._key} changed while it was being stored")
        return chunk


class _Download(io.RawIOBase):
    """A response as a raw stream that fails with Toile's errors."""

    def __init__(self, response: Any, key: str) -> None:
        self._response = response
        self._key = key

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _translated(self._key):
            chunk = self._response.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _upload(
    client: Minio,
    bucket: str,
    key: str,
    stream: BinaryIO,
    digest: str,
    size_bytes: int,
    media_type: str,
) -> None:
    """Send an object, in parts if it is large; the client aborts those when one fails."""
    client.put_object(
        bucket,
        key,
        _Upload(stream, key, digest, size_bytes),
        size_bytes,
        content_type=media_type,
        metadata={_DIGEST: digest},
        part_size=PART_BYTES,
        num_parallel_uploads=1,  # the pool for more leaks its threads when a part fails
    )


@contextlib.contextmanager
def _prepared(data: Source) -> Iterator[tuple[BinaryIO, str, int]]:
    """Give a seekable stream over the bytes, with their digest and size."""
    if isinstance(data, bytes):
        yield (io.BytesIO(data), *sha256(data))
    elif isinstance(data, Path):
        digest_and_size = sha256(data)
        with data.open("rb") as stream:
            yield (stream, *digest_and_size)
    else:
        with tempfile.SpooledTemporaryFile(max_size=PART_BYTES) as spool:
            hasher = hashlib.sha256()
            for chunk in chunks(data):
                hasher.update(chunk)
                try:
                    spool.write(chunk)
                except OSError as error:
                    if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                        raise
                    raise DiskFullError("no space is left for temporary files") from error
            size_bytes = spool.tell()
            spool.seek(0)
            yield cast("BinaryIO", spool), hasher.hexdigest(), size_bytes


def _digest(metadata: Mapping[str, str] | None) -> str | None:
    """Find the digest among headers or a listing's metadata, which spell names differently."""
    for name, value in (metadata or {}).items():
        if name.lower() == _DIGEST:
            return value
    return None


def _client(kind: type[Minio], settings: S3Settings, http: urllib3.PoolManager) -> Minio:
    return kind(
        settings.endpoint,
        access_key=settings.access_key,
        secret_key=settings.secret_key.get_secret_value(),
        secure=settings.secure,
        region=settings.region,
        http_client=http,
    )


def _patient() -> urllib3.PoolManager:
    """Return connections that outlast a hiccup and give up on a dead server within seconds."""
    return urllib3.PoolManager(
        maxsize=16,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        retries=urllib3.Retry(
            connect=2,
            read=1,
            status=3,
            other=0,
            backoff_factor=0.2,
            status_forcelist=[500, 502, 503, 504],
        ),
        ssl_context=ssl.create_default_context(),
    )


def _impatient() -> urllib3.PoolManager:
    """Return connections for readiness, which is asked for again soon anyway."""
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(PROBE_SECONDS),
        retries=urllib3.Retry(0),
        ssl_context=ssl.create_default_context(),
    )


@contextlib.contextmanager
def _translated(subject: str) -> Iterator[None]:
    """Turn the client's and its connections' errors into Toile's."""
    try:
        yield
    except S3Error as error:
        raise _from_s3(error, subject) from error
    except (MinioException, urllib3.exceptions.HTTPError) as error:
        raise StoreUnavailableError(f"the object store does not answer: {_short(error)}") from error


def _from_s3(error: S3Error, subject: str) -> ToileError:
    if error.code in _ABSENT:
        return NotFoundError(f"there is no artifact {subject}", reason="ARTIFACT_NOT_FOUND")
    if error.code in _TAKEN:
        return AlreadyExistsError(
            f"there is already an artifact {subject}", reason="ARTIFACT_EXISTS"
        )
    if error.code in _FULL:
        return DiskFullError("no space is left in the object store")
    if error.code in _DENIED:
        return StoreUnavailableError(
            f"the object store refuses these credentials: {error.code}", reason="STORE_DENIED"
        )
    return StoreUnavailableError(f"the object store failed: {error.code}: {error.message}")


def _short(error: Exception) -> str:
    if isinstance(error, ServerError):
        return f"HTTP status {error.status_code}"
    cause = getattr(error, "reason", None) or error
    return type(cause).__name__
