"""Embeddings of a dataset version's images: computed once, kept beside the version."""

import asyncio
import io
from collections import OrderedDict

import numpy as np
from sqlalchemy import select

from toile.core.artifacts import ArtifactStore, read_manifest
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import BaseRow, DatasetItemRow, DatasetVersionRow
from toile.core.errors import DataLossError, FailedPreconditionError, NotFoundError
from toile.core.names import DatasetVersionName
from toile.rank.evidence import Witness, encode
from toile.scoring.evidence import FloatArray

_REMEMBERED = 8  # versions whose embeddings stay in memory
_BATCH = 16


class References:
    """Embeddings `[N, D]` of versions, by version and base; both are immutable by digest."""

    def __init__(self, catalog: Catalog, store: ArtifactStore, witness: Witness) -> None:
        self._catalog = catalog
        self._store = store
        self._witness = witness
        self._recent: OrderedDict[str, FloatArray] = OrderedDict()

    async def of(self, version: DatasetVersionRow, base: BaseRow) -> FloatArray:
        """Return the embeddings of a version's images under a base's image tower.

        Raises:
            FailedPreconditionError: The version has no images (`EMPTY_DATASET`).
        """
        key = self._key(version, base)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        found = await asyncio.to_thread(self._read, key)
        if found is None:
            found = await self._compute(version, base)
            await asyncio.to_thread(self._write, key, found)
        self._recent[key] = found
        while len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        return found

    async def _compute(self, version: DatasetVersionRow, base: BaseRow) -> FloatArray:
        artifacts = await asyncio.to_thread(self._artifacts, version)
        if not artifacts:
            raise FailedPreconditionError(
                f"{version.name} has no images to compare with", reason="EMPTY_DATASET"
            )
        embeddings: list[FloatArray] = []
        for start in range(0, len(artifacts), _BATCH):
            some = artifacts[start : start + _BATCH]
            encoded = await asyncio.gather(*(asyncio.to_thread(self._load, key) for key in some))
            embeddings += await self._witness.embed(base.artifact, encoded)
        return np.stack(embeddings)

    def _artifacts(self, version: DatasetVersionRow) -> list[str]:
        statement = (
            select(DatasetItemRow.file_name)
            .where(DatasetItemRow.version == version.name)
            .order_by(DatasetItemRow.file_name)
        )
        with self._catalog.reading() as session:
            names = list(session.scalars(statement))
        published = read_manifest(self._store, version.artifact)
        return [published.key(version.artifact, name) for name in names]

    def _load(self, artifact: str) -> bytes:
        return encode(self._witness.load(artifact))

    @staticmethod
    def _key(version: DatasetVersionRow, base: BaseRow) -> str:
        name = DatasetVersionName.parse(version.name)
        return (
            f"projects/{name.project}/datasets/{name.dataset}/embeddings/"
            f"{version.digest[:16]}-{base.digest[:16]}.npy"
        )

    def _read(self, key: str) -> FloatArray | None:
        """What was kept; None when nothing was, or it is damaged and made again."""
        try:
            data = self._store.get(key)
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (NotFoundError, DataLossError, ValueError, EOFError):
            return None
        sound = array.ndim == 2 and array.shape[0] > 0 and bool(np.isfinite(array).all())
        return np.asarray(array, dtype=np.float64) if sound else None

    def _write(self, key: str, embeddings: FloatArray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, embeddings.astype(np.float32), allow_pickle=False)
        self._store.put(key, buffer.getvalue(), media_type="application/octet-stream")
