"""Images that are there: uploaded, read, listed, followed back to where they came from."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import BinaryIO

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore
from toile.core.artifacts.store import MAX_EXPIRES_SECONDS
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    DatasetItemRow,
    GenerationAdapterRow,
    GenerationRow,
    ImageRow,
    ModelVersionRow,
    RefinementRow,
)
from toile.core.catalog.paging import page
from toile.core.clock import now
from toile.core.content import restricted_term
from toile.core.errors import InvalidArgumentError, NotFoundError
from toile.core.images import image_to_proto, put_image
from toile.core.names import GenerationName, ImageName, ProjectName
from toile.core.settings import Limits
from toile.generate.checks import within
from toile.generate.convert import generation_to_proto
from toile.generate.records import images_of
from toile.imaging import decode
from toile.v1 import common_pb2, generate_pb2

LINK_SECONDS = 3600


class Library:
    """Reads generations and images, and takes in a client's own."""

    def __init__(self, limits: Limits, catalog: Catalog, store: ArtifactStore) -> None:
        self._limits = limits
        self._catalog = catalog
        self._store = store

    def upload(self, parent: str, prompt: str, data: bytes) -> common_pb2.Image:
        """Store an image; the same bytes again are the same image.

        It is for adults when the prompt says so, or when an image of the project with the same
        bytes is; that a later upload says nothing takes no rating back.

        Raises:
            BadImageError: The bytes are not an image that can be used.
            InvalidArgumentError: The prompt is too long (`PROMPT_TOO_LONG`).
        """
        project = ProjectName.parse(parent, "parent").project
        if len(prompt) > self._limits.prompt_characters:
            raise InvalidArgumentError(
                f"prompt has {len(prompt)} characters; "
                f"{self._limits.prompt_characters} are the most",
                field="prompt",
                reason="PROMPT_TOO_LONG",
            )
        # The name is made of the bytes, so that two uploads at once cannot make two images.
        digest = hashlib.sha256(data).hexdigest()
        name = str(ImageName(project, f"u{digest[:32]}"))
        restricted = restricted_term(prompt) is not None
        with self._catalog.transaction() as session:
            restricted = restricted or _is_restricted(session, project, digest)
            known = _rated(session, name, restricted=restricted)
        if known is not None:
            return image_to_proto(known)
        info = decode.probe(data, self._limits)
        decode.decode(data, self._limits)  # damage that only decoding shows
        image = put_image(
            self._store,
            project=project,
            name=name,
            data=data,
            width=info.width,
            height=info.height,
            origin=common_pb2.IMAGE_ORIGIN_UPLOADED,
            media_type=info.media_type,
            prompt=prompt,
            restricted=restricted,
        )
        with self._catalog.transaction() as session:
            first = _rated(session, name, restricted=restricted)
            if first is None:
                session.add(image)
        return image_to_proto(first or image)

    def image(self, name: str) -> common_pb2.Image:
        """Return an image's record.

        Raises:
            NotFoundError: There is no such image.
        """
        with self._catalog.reading() as session:
            return image_to_proto(_image(session, name))

    def images(self, request: generate_pb2.ListImagesRequest) -> generate_pb2.ListImagesResponse:
        """Page through a project's images, newest first."""
        project = ProjectName.parse(request.parent, "parent").project
        with self._catalog.reading() as session:
            rows, token = page(
                session,
                select(ImageRow).where(ImageRow.project == project),
                [ImageRow.create_time, ImageRow.name],
                page_size=request.page_size,
                page_token=request.page_token,
                scope=f"ListImages {request.parent}",
                descending=True,
            )
        return generate_pb2.ListImagesResponse(
            images=[image_to_proto(row) for row in rows], next_page_token=token
        )

    def link(self, name: str, expires_seconds: int) -> generate_pb2.GetImageLinkResponse:
        """Return a link to an image's bytes.

        Raises:
            NotFoundError: There is no such image.
            InvalidArgumentError: It would work longer than a week.
        """
        lasts = within("expires_seconds", expires_seconds or LINK_SECONDS, 1, MAX_EXPIRES_SECONDS)
        with self._catalog.reading() as session:
            artifact = _image(session, name).artifact
        answer = generate_pb2.GetImageLinkResponse(
            url=self._store.presigned_url(artifact, expires_seconds=lasts)
        )
        answer.expire_time.FromDatetime(now() + timedelta(seconds=lasts))
        return answer

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open an image's bytes.

        Raises:
            NotFoundError: There is no such image.
            StoreUnavailableError: The artifact store does not answer.
        """
        with self._catalog.reading() as session:
            artifact = _image(session, name).artifact
        return self._store.open(artifact)

    def generation(self, name: str) -> generate_pb2.Generation:
        """Return a generation with its images.

        Raises:
            NotFoundError: There is none.
        """
        GenerationName.parse(name)
        with self._catalog.reading() as session:
            row = session.get(GenerationRow, name)
            if row is None:
                raise NotFoundError(f"there is no {name}", metadata={"name": name})
            return generation_to_proto(row, images_of(session, [name])[name])

    def generations(
        self, request: generate_pb2.ListGenerationsRequest
    ) -> generate_pb2.ListGenerationsResponse:
        """Page through a project's generations, newest first."""
        project = ProjectName.parse(request.parent, "parent").project
        with self._catalog.reading() as session:
            rows, token = page(
                session,
                select(GenerationRow).where(GenerationRow.project == project),
                [GenerationRow.name],  # ids sort by time
                page_size=request.page_size,
                page_token=request.page_token,
                scope=f"ListGenerations {request.parent}",
                descending=True,
            )
            images = images_of(session, [row.name for row in rows])
            return generate_pb2.ListGenerationsResponse(
                generations=[generation_to_proto(row, images[row.name]) for row in rows],
                next_page_token=token,
            )

    def lineage(self, name: str) -> generate_pb2.GetImageLineageResponse:
        """Follow an image back: images it was made from, base, adapters, photographs.

        Raises:
            NotFoundError: There is no such image.
        """
        with self._catalog.reading() as session:
            images = list(_ancestry(session, _image(session, name)))
            producers = [image.producer for image in images if image.producer]
            return generate_pb2.GetImageLineageResponse(
                images=[image_to_proto(image) for image in images],
                base=_base(session, producers),
                adapters=_adapters(session, producers),
            )


def _is_restricted(session: Session, project: str, digest: str) -> bool:
    """Whether an image of these bytes is for adults."""
    wanted = select(ImageRow.name).where(
        ImageRow.digest == digest,
        ImageRow.project == project,
        ImageRow.content_rating == "RESTRICTED",
    )
    return session.scalar(wanted.limit(1)) is not None


def _rated(session: Session, name: str, *, restricted: bool) -> ImageRow | None:
    """Return an image that is there, as one for adults if it is; its rating only goes up."""
    row = session.get(ImageRow, name)
    if row is not None and restricted:
        row.content_rating = "RESTRICTED"
    return row


def _image(session: Session, name: str) -> ImageRow:
    ImageName.parse(name)
    row = session.get(ImageRow, name)
    if row is None:
        raise NotFoundError(f"there is no {name}", metadata={"name": name})
    return row


def _ancestry(session: Session, image: ImageRow) -> Iterator[ImageRow]:
    current: ImageRow | None = image
    while current is not None:
        yield current
        parent = current.parent_image
        current = session.get(ImageRow, parent) if parent else None


def _base(session: Session, producers: list[str]) -> str:
    for producer in producers:
        row = session.get(GenerationRow, producer) or session.get(RefinementRow, producer)
        if row is not None:
            return row.base
    return ""


def _adapters(session: Session, producers: list[str]) -> list[generate_pb2.AdapterLineage]:
    """Return the adapters of all producers, the nearest one's weight where several share one."""
    found: dict[str, generate_pb2.AdapterLineage] = {}
    for producer in producers:
        used = select(GenerationAdapterRow).where(GenerationAdapterRow.producer == producer)
        for row in session.scalars(used.order_by(GenerationAdapterRow.model_version)):
            if row.model_version not in found:
                version = session.get_one(ModelVersionRow, row.model_version)
                found[version.name] = generate_pb2.AdapterLineage(
                    model_version=version.name,
                    weight=row.weight,
                    dataset_version=version.dataset_version or "",
                    dataset_digest=version.dataset_digest,
                    photographs=_photographs(session, version.dataset_version),
                    imported_digest=version.imported_digest,
                )
    return list(found.values())


def _photographs(session: Session, version: str | None) -> list[generate_pb2.SourcePhotograph]:
    items = select(DatasetItemRow).where(DatasetItemRow.version == version)
    sources = {
        item.source_digest: item.source_file_name
        for item in session.scalars(items.order_by(DatasetItemRow.file_name))
    }
    return [
        generate_pb2.SourcePhotograph(file_name=file_name, digest=digest)
        for digest, file_name in sources.items()
    ]
