"""Asking the models what the scorers need to know about images."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.models import ImageRow
from toile.core.errors import BadImageError, ComputeUnavailableError, DataLossError
from toile.core.inference import Inference
from toile.core.settings import Settings
from toile.imaging.decode import decode
from toile.rank.plan import RankPlan
from toile.scoring import Evidence, Need
from toile.scoring.evidence import JUDGED_SIDE_PIXELS, BoolArray, FloatArray

_BATCH = 8  # images in hand at a time


Models: TypeAlias = Callable[[], Inference]
"""Gives the client of the models, which is opened in the loop that uses it."""


class Witness:
    """Gathers evidence about images, a batch at a time."""

    def __init__(self, settings: Settings, store: ArtifactStore, models: Models) -> None:
        self._settings = settings
        self._store = store
        self._models = models

    async def examine(
        self, plan: RankPlan, references: FloatArray | None
    ) -> AsyncIterator[tuple[ImageRow, Evidence]]:
        """Yield each image of a plan with what the plan's scorers need, in order."""
        texts = await self._embed_prompts(plan)
        for start in range(0, len(plan.images), _BATCH):
            rows = plan.images[start : start + _BATCH]
            pictures = await asyncio.gather(
                *(asyncio.to_thread(self.load, r.artifact) for r in rows)
            )
            encoded = await asyncio.to_thread(lambda some: [encode(p) for p in some], pictures)
            embeddings, garments = await asyncio.gather(
                self._embed(plan, encoded), self._segment(plan, encoded)
            )
            for place, row in enumerate(rows):
                yield (
                    row,
                    Evidence(
                        pixels=np.asarray(pictures[place]),
                        prompt=plan.prompt_of(row),
                        embedding=embeddings[place],
                        prompt_embedding=texts.get(plan.prompt_of(row)),
                        garment=garments[place],
                        references=references,
                    ),
                )

    async def embed(self, base_artifact: str, encoded: Sequence[bytes]) -> list[FloatArray]:
        """Embeddings of encoded images, unit length, in as many calls as messages allow."""
        embeddings: list[FloatArray] = []
        for group in _groups(encoded, self._settings.limits.message_bytes // 2):
            answer = await self._models().embed_images(base_artifact, group)
            embeddings += [unit(values) for values in answer]
        return embeddings

    def load(self, artifact: str) -> Image.Image:
        """Read an image and shrink it to what is judged.

        Raises:
            NotFoundError: The artifact is gone.
            DataLossError: It is damaged; it was sound when it was stored.
        """
        try:
            picture = decode(self._store.get(artifact), self._settings.limits, min_side_pixels=1)
        except BadImageError as error:
            raise DataLossError(
                f"{artifact} is damaged: {error.message}", metadata={"artifact": artifact}
            ) from error
        picture.thumbnail((JUDGED_SIDE_PIXELS, JUDGED_SIDE_PIXELS), Image.Resampling.LANCZOS)
        return picture

    def _load_encoded(self, artifact: str) -> tuple[Image.Image, bytes]:
        picture = self.load(artifact)
        return picture, encode(picture)

    async def _embed_prompts(self, plan: RankPlan) -> dict[str, FloatArray]:
        prompts = sorted({prompt for row in plan.images if (prompt := plan.prompt_of(row))})
        if Need.PROMPT_EMBEDDING not in plan.needs or not prompts:
            return {}
        answer = await self._models().embed_texts(plan.base.artifact, prompts)
        return {text: unit(values) for text, values in zip(prompts, answer, strict=True)}

    async def _embed(self, plan: RankPlan, encoded: Sequence[bytes]) -> Sequence[FloatArray | None]:
        if Need.EMBEDDING not in plan.needs:
            return [None] * len(encoded)
        return await self.embed(plan.base.artifact, encoded)

    async def _segment(
        self, plan: RankPlan, encoded: Sequence[bytes]
    ) -> Sequence[BoolArray | None]:
        if Need.GARMENT not in plan.needs:
            return [None] * len(encoded)
        artifact = plan.base.artifact
        answers = await asyncio.gather(*(self._models().segment(artifact, e) for e in encoded))
        return [garment_mask(png, labels) for png, labels in answers]


def garment_mask(label_png: bytes, labels: Sequence[str]) -> BoolArray:
    """Where a segmenter's label map `[H, W]` is not background."""
    values = np.asarray(Image.open(io.BytesIO(label_png)).convert("L"))
    garment: BoolArray = values != labels.index("background")
    return garment


def unit(values: Sequence[float]) -> FloatArray:
    """An embedding with length one, so that products are cosines.

    Raises:
        ComputeUnavailableError: It is not finite, or nought (`BAD_EMBEDDING`).
    """
    vector = np.asarray(values, dtype=np.float64)
    length = float(np.linalg.norm(vector))
    if not vector.size or not np.isfinite(length) or length == 0:
        raise ComputeUnavailableError(
            "the models gave an embedding that is not finite or is nought",
            reason="BAD_EMBEDDING",
        )
    return vector / length


def encode(picture: Image.Image) -> bytes:
    """A picture as PNG, quickly: it is read once and thrown away."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _groups(encoded: Sequence[bytes], most_bytes: int) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for data in encoded:
        if group and size + len(data) > most_bytes:
            yield group
            group, size = [], 0
        group.append(data)
        size += len(data)
    if group:
        yield group
