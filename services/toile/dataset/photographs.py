"""Taking one photograph into a dataset: judged, stored under its digest, then recorded."""

import unicodedata
from enum import Enum
from pathlib import Path

from sqlalchemy import func, select

from toile.core.artifacts import ArtifactStore
from toile.core.artifacts.store import sha256
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import DatasetRow, PhotographRow
from toile.core.errors import BadImageError, NotFoundError
from toile.core.names import DatasetName
from toile.core.settings import Limits
from toile.dataset.convert import Rejection
from toile.imaging.decode import ImageInfo, decode, probe

MIN_SIDE_PIXELS = 64
"""A photograph below this shows no cloth."""

_FILE_NAME_CHARACTERS = 255


class Outcome(Enum):
    """What became of a usable file."""

    IMPORTED = "imported"
    DUPLICATE = "duplicate"


class Photographs:
    """Writes photographs of datasets. Safe to share between threads."""

    def __init__(self, catalog: Catalog, store: ArtifactStore, limits: Limits) -> None:
        self._catalog = catalog
        self._store = store
        self._limits = limits

    def add(
        self, dataset: DatasetName, file_name: str, caption: str, path: Path
    ) -> Outcome | Rejection:
        """Take a file into a dataset; a file that cannot be used is returned as a rejection.

        The artifact is written before the row, so that a row always has its bytes.

        Raises:
            StoreUnavailableError: The artifact store does not answer.
            DiskFullError: No space is left.
        """
        file_name, caption = clean_name(file_name), " ".join(caption.split())
        if len(caption) > self._limits.prompt_characters:
            return Rejection(
                file_name,
                "CAPTION_TOO_LONG",
                f"the caption has {len(caption)} characters, "
                f"{self._limits.prompt_characters} are allowed",
            )
        try:
            info = self._judge(path)
        except BadImageError as error:
            return Rejection(file_name, error.reason, error.message)
        digest, _ = sha256(path)
        if self._has(dataset, digest):
            return Outcome.DUPLICATE
        key = f"{dataset.parent}/photographs/{digest}"
        if not self._store.exists(key):
            self._store.put(key, path, media_type=info.media_type)
        return self._record(dataset, file_name, caption, digest, key, info)

    def _judge(self, path: Path) -> ImageInfo:
        info = probe(path, self._limits, min_side_pixels=MIN_SIDE_PIXELS)
        decode(path, self._limits, min_side_pixels=MIN_SIDE_PIXELS).close()
        return info

    def _has(self, dataset: DatasetName, digest: str) -> bool:
        with self._catalog.reading() as session:
            return session.get(PhotographRow, (str(dataset), digest)) is not None

    def _record(
        self,
        dataset: DatasetName,
        file_name: str,
        caption: str,
        digest: str,
        key: str,
        info: ImageInfo,
    ) -> Outcome:
        name = str(dataset)
        with self._catalog.transaction() as session:
            # Locked: imports into one dataset take their places one after another.
            if session.get(DatasetRow, name, with_for_update=True) is None:
                raise NotFoundError(f"{name} does not exist", metadata={"name": name})
            if session.get(PhotographRow, (name, digest)) is not None:
                return Outcome.DUPLICATE
            last = session.scalar(
                select(func.max(PhotographRow.sequence)).where(PhotographRow.dataset == name)
            )
            session.add(
                PhotographRow(
                    dataset=name,
                    digest=digest,
                    sequence=(last or 0) + 1,
                    file_name=file_name,
                    media_type=info.media_type,
                    width=info.width,
                    height=info.height,
                    caption=caption,
                    artifact=key,
                )
            )
        return Outcome.IMPORTED


def clean_name(file_name: str) -> str:
    """Return a file name fit to be shown: no control characters, at most 255 characters."""
    kept = "".join(c for c in file_name if not unicodedata.category(c).startswith("C"))
    return kept.strip()[-_FILE_NAME_CHARACTERS:] or "unnamed"
