"""The artifact store: every file that Toile keeps, in a folder or an object store."""

from toile.core.artifacts.cache import fetch
from toile.core.artifacts.manifest import (
    FileEntry,
    Manifest,
    delete_folder,
    publish,
    publish_folder,
    publish_stored,
    read_manifest,
)
from toile.core.artifacts.opening import open_store
from toile.core.artifacts.store import ArtifactInfo, ArtifactStore

__all__ = [
    "ArtifactInfo",
    "ArtifactStore",
    "FileEntry",
    "Manifest",
    "delete_folder",
    "fetch",
    "open_store",
    "publish",
    "publish_folder",
    "publish_stored",
    "read_manifest",
]
