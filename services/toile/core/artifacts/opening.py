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
        InvalidArgumentError: `artifacts_url` is neither `file:///folder` nor `s3`.
        StoreUnavailableError: It is a folder that cannot be made.
    """
    url = settings.resolved_artifacts_url
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return LocalStore(Path(unquote(parts.path)))
    raise InvalidArgumentError(
        f"artifacts_url must be file:///folder or s3, not {url!r}", field="artifacts_url"
    )
