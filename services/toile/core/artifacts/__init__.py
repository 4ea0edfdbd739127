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
from toile.core.artifacts.patience import fetch_patiently, may_come_back
from toile.core.artifacts.store import ArtifactInfo, ArtifactStore

__all__ = [
    "ArtifactInfo",
    "ArtifactStore",
    "FileEntry",
    "Manifest",
    "delete_folder",
    "fetch",
    "fetch_patiently",
    "may_come_back",
    "open_store",
    "publish",
    "publish_folder",
    "publish_stored",
    "read_manifest",
]
