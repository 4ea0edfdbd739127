"""Images in the catalog: one artifact and one row each, the artifact first."""

import hashlib

from google.protobuf.timestamp_pb2 import Timestamp

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.models import ImageRow
from toile.core.clock import now
from toile.core.context import new_id
from toile.core.names import ImageName
from toile.v1 import common_pb2

_SUFFIXES = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/tiff": "tiff",
    "image/bmp": "bmp",
}


def put_image(
    store: ArtifactStore,
    *,
    project: str,
    data: bytes,
    width: int,
    height: int,
    origin: common_pb2.ImageOrigin.ValueType,
    media_type: str = "image/png",
    producer: str = "",
    producer_index: int = 0,
    parent_image: str = "",
    prompt: str = "",
    seed: int | None = None,
    name: str = "",
    restricted: bool = False,
    seam_score: float | None = None,
) -> ImageRow:
    """Write an image's bytes and return its row, which the caller adds in its own transaction.

    An image whose row is never added is not visible to anybody.

    Args:
        store: Where the bytes go.
        project: Id of the project, without `projects/`.
        data: The encoded image.
        width: Pixels.
        height: Pixels.
        origin: Where it came from.
        media_type: Of the encoded image: PNG, JPEG, WebP, GIF, TIFF or BMP.
        producer: Name of the generation or refinement that made it.
        producer_index: Place among the producer's images.
        parent_image: Image that it was made from.
        prompt: Prompt that made it.
        seed: Seed of this very image.
        name: Name to give it, such as one that its metadata already holds; a fresh one if empty.
        restricted: It is for adults; see `core.content`.
        seam_score: How visible the seams of a repeat are; None for a picture that stands alone.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
        DiskFullError: No space is left.
    """
    image = ImageName.parse(name) if name else fresh_name(project)
    key = f"projects/{project}/images/{image.image}.{_SUFFIXES[media_type]}"
    store.put(key, data, media_type=media_type)
    return ImageRow(
        name=str(image),
        project=project,
        origin=origin_text(origin),
        producer=producer,
        producer_index=producer_index,
        parent_image=parent_image,
        artifact=key,
        digest=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        media_type=media_type,
        width=width,
        height=height,
        prompt=prompt,
        seed=seed,
        content_rating="RESTRICTED" if restricted else "GENERAL",
        seam_score=seam_score,
        create_time=now(),
    )


def fresh_name(project: str) -> ImageName:
    """Return a name that no image has."""
    return ImageName(project, new_id())


def origin_text(origin: common_pb2.ImageOrigin.ValueType) -> str:
    """Return the origin as `ImageRow.origin` holds it, such as `GENERATED`."""
    return common_pb2.ImageOrigin.Name(origin).removeprefix("IMAGE_ORIGIN_")


def image_to_proto(row: ImageRow) -> common_pb2.Image:
    """Return the message of a row."""
    created = Timestamp()
    created.FromDatetime(row.create_time)
    return common_pb2.Image(
        name=row.name,
        origin=common_pb2.ImageOrigin.Value(f"IMAGE_ORIGIN_{row.origin}"),
        media_type=row.media_type,
        width=row.width,
        height=row.height,
        digest=row.digest,
        size_bytes=row.size_bytes,
        prompt=row.prompt,
        seed=row.seed,
        producer=row.producer,
        parent_image=row.parent_image,
        create_time=created,
        content_rating=common_pb2.ContentRating.Value(f"CONTENT_RATING_{row.content_rating}"),
        seam_score=row.seam_score,
    )
