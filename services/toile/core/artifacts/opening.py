"""From settings to a store."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from toile.core.artifacts.local import LocalStore
from toile.core.artifacts.store import ArtifactStore
from toile.core.errors import InvalidArgumentError
from toile.core.settings import Settings


def open_store(settings: Settings) -> ArtifactStore:
    """Open the store that the settings name.

    Raises:
        InvalidArgumentError: `artifacts_url` is neither `file:///folder` nor `s3`, or the object
            store's address is not host:port.
        StoreUnavailableError: It is a folder that cannot be made.
    """
    url = settings.resolved_artifacts_url
    if url == "s3":
        return _open_s3(settings)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return LocalStore(Path(unquote(parts.path)))
    raise InvalidArgumentError(
        f"artifacts_url must be file:///folder or s3, not {url!r}", field="artifacts_url"
    )


def _open_s3(settings: Settings) -> ArtifactStore:
    # Here, so that one machine's processes need not load the client and its connections.
    from toile.core.artifacts.s3 import S3Store

    try:
        return S3Store(settings.s3)
    except ValueError as error:
        raise InvalidArgumentError(
            f"s3.endpoint must be host:port, not {settings.s3.endpoint!r}: {error}",
            field="s3.endpoint",
        ) from error
