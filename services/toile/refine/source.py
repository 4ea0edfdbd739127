"""The image that is refined, with what drew it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.adapter_types import AdapterType
from toile.core.bases import resolve_base
from toile.core.catalog.models import (
    BaseRow,
    GenerationAdapterRow,
    GenerationRow,
    ImageRow,
    ModelVersionRow,
    RefinementRow,
)
from toile.core.errors import NotFoundError
from toile.core.names import GenerationName, ImageName, RefinementName
from toile.core.settings import Settings


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter that drew the image, and draws its refinement, so that the style stays."""

    model_version: str
    artifact: str
    weight: float


@dataclass(frozen=True)
class Source:
    """An image, its base (the platform's default for uploads) and its adapters."""

    image: ImageRow
    base: BaseRow
    adapters: Sequence[SourceAdapter]


def find_source(session: Session, settings: Settings, name: str) -> Source:
    """Return an image with what drew it.

    Raises:
        InvalidArgumentError: The name is not an image's.
        NotFoundError: There is no such image, or no base to draw with.
    """
    ImageName.parse(name, "image")
    image = session.get(ImageRow, name)
    if image is None:
        raise NotFoundError(f"there is no image {name}", metadata={"name": name})
    producer: GenerationRow | RefinementRow | None = None
    if GenerationName.matches(image.producer):
        producer = session.get(GenerationRow, image.producer)
    elif RefinementName.matches(image.producer):
        producer = session.get(RefinementRow, image.producer)
    base = producer.base if producer else settings.default_base
    adapters = session.execute(
        select(
            GenerationAdapterRow.model_version,
            ModelVersionRow.artifact,
            GenerationAdapterRow.weight,
        )
        .join(ModelVersionRow, ModelVersionRow.name == GenerationAdapterRow.model_version)
        .where(
            GenerationAdapterRow.producer == (image.producer or None),
            ModelVersionRow.adapter_type == AdapterType.LORA,
        )
        .order_by(GenerationAdapterRow.model_version)
    )
    return Source(image, resolve_base(session, base), [SourceAdapter(*row) for row in adapters])
