"""Published folders on the local disk, downloaded once and verified."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toile.core.artifacts.manifest import Manifest, read_manifest
from toile.core.artifacts.store import STALE_SECONDS, ArtifactStore, chunks
from toile.core.errors import DataLossError, DiskFullError, NotFoundError

_DOWNLOADS = 8  # at once
_PARTIAL = "partial-"


def fetch(store: ArtifactStore, prefix: str, cache: Path) -> Path:
    """Return a folder with the files published under a prefix, downloading it when needed.

    The folder is `cache/{manifest digest}`. It appears complete and verified or not at all, so
    any number of processes may fetch the same one at once. Do not write into it.

    Raises:
        NotFoundError: Nothing is published there.
        DataLossError: A file is gone or does not match its digest.
        DiskFullError: The cache has no room.
    """
    manifest = read_manifest(store, prefix)
    folder = cache / manifest.digest
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
        try:
            _download(store, prefix, manifest, partial)
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(f"no space is left in {cache}") from error
        raise
    return folder


def _download(store: ArtifactStore, prefix: str, manifest: Manifest, target: Path) -> None:
    def download(name: str) -> None:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        try:
            with store.open(manifest.key(prefix, name)) as source, path.open("wb") as sink:
                for chunk in chunks(source):
                    digest.update(chunk)
                    sink.write(chunk)
                # Else a power cut could leave a folder that looks verified and holds holes.
                sink.flush()
                os.fsync(sink.fileno())
        except NotFoundError as error:
            raise DataLossError(f"{prefix}/{name} was published and is gone") from error
        if digest.hexdigest() != manifest.files[name].digest:
            raise DataLossError(f"{prefix}/{name} does not match its digest")

    with ThreadPoolExecutor(max_workers=_DOWNLOADS) as pool:
        for _ in pool.map(download, manifest.files):
            pass


def _publish(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)  # mkdtemp's folders are private
    try:
        partial.rename(folder)
    except OSError as error:
        # Another process was faster; what it put there was verified too.
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY} or not folder.is_dir():
            raise


def _sweep(cache: Path) -> None:
    """Clear away what processes that died long ago had half downloaded."""
    limit = time.time() - STALE_SECONDS
    for path in cache.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # its owner is alive after all
            if path.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)
