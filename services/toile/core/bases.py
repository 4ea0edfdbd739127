"""Base model bundles: taken into the artifact store whole, found again by name."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.artifacts import (
    ArtifactStore,
    FileEntry,
    Manifest,
    publish_folder,
    read_manifest,
)
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import BaseRow, GenerationRow, ModelVersionRow, RefinementRow
from toile.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from toile.core.names import BaseName
from toile.core.settings import Settings

DESCRIPTION_FILE = "toile.json"
_UNET_CONFIG = "unet/config.json"
_REQUIRED = (
    DESCRIPTION_FILE,
    "model_index.json",
    _UNET_CONFIG,
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
)
_SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "in_channels": 4,
}
"""What tells SDXL's UNet from those of other pipelines, of inpainting and of editing."""
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


def import_base(
    settings: Settings, catalog: Catalog, store: ArtifactStore, folder: Path, name: str = ""
) -> BaseRow:
    """Publish a bundle folder as `bases/{base}` and record it; the same folder twice is one base.

    The name is `settings.default_base` when none is given.

    The folder has diffusers' SDXL layout with `toile.json` beside it. A name keeps its bundle
    once something was trained on it or drawn with it.

    Raises:
        InvalidArgumentError: The folder is not a bundle of SDXL's architecture, or holds pickles
            (`BAD_BASE`).
        AlreadyExistsError: The name is in use for another bundle (`BASE_CHANGED`).
        StoreUnavailableError: The artifact store does not answer.
    """
    name = name or settings.default_base
    base = BaseName.parse(name)
    description = read_description(folder)
    digest = bundle_digest(folder)
    prefix = f"bases/{base.base}/{digest[:12]}"
    with catalog.transaction() as session:
        _check_replaceable(session, name, digest)
    publish_folder(store, prefix, folder)
    with catalog.transaction() as session:
        _check_replaceable(session, name, digest)
        row = BaseRow(
            name=name,
            artifact=prefix,
            digest=digest,
            native_size=int(description["native_size"]),
            license=str(description.get("licence") or description.get("license") or ""),
        )
        return session.merge(row)


def bundle_digest(folder: Path) -> str:
    """Return the digest that a bundle folder has in the store: of its manifest, unpublished."""
    files: dict[str, FileEntry] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = FileEntry(path.stat().st_size, digest)
    return Manifest(files=files, metadata={}).digest


def read_description(folder: Path) -> dict[str, Any]:
    """Return a bundle's `toile.json`.

    Raises:
        InvalidArgumentError: The folder is not a bundle of SDXL's architecture, or holds pickles
            (`BAD_BASE`).
    """
    _check_architecture(
        str(folder),
        lambda path: (folder / path).is_file(),
        lambda: (folder / _UNET_CONFIG).read_bytes(),
    )
    for path in folder.rglob("*"):
        if path.suffix.lower() in _PICKLES:
            raise _bad_base(f"{path} may be a pickle: bases are safetensors only")
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _bad_base(f"{folder / DESCRIPTION_FILE} is not JSON: {error}") from error
    size = description.get("native_size") if isinstance(description, dict) else None
    if not isinstance(size, int) or size <= 0 or size % 8:
        raise _bad_base(f"native_size in {folder / DESCRIPTION_FILE} must be a multiple of 8")
    return dict(description)


def resolve_base(session: Session, name: str) -> BaseRow:
    """Return a base's row.

    Raises:
        InvalidArgumentError: The name does not look like `bases/{base}`.
        NotFoundError: There is no such base.
    """
    BaseName.parse(name, "base")
    row = session.get(BaseRow, name)
    if row is None:
        raise NotFoundError(f"there is no base {name}", metadata={"name": name})
    return row


def check_architecture(store: ArtifactStore, base: BaseRow) -> None:
    """Refuse a base that nothing can be trained on, such as one of an older import.

    Raises:
        InvalidArgumentError: It is not of SDXL's architecture (`BAD_BASE`).
        StoreUnavailableError: The artifact store does not answer.
    """
    manifest = read_manifest(store, base.artifact)
    _check_architecture(
        base.name,
        lambda path: path in manifest.files,
        lambda: store.get(manifest.key(base.artifact, _UNET_CONFIG)),
    )


def check_has_part(store: ArtifactStore, base: BaseRow, part: str, field: str) -> None:
    """Refuse what a field of a request asks of a base that lacks a part, such as "segmenter".

    Raises:
        FailedPreconditionError: It does (`BASE_LACKS_PART`).
        StoreUnavailableError: The artifact store does not answer.
    """
    if not any(file.startswith(f"{part}/") for file in read_manifest(store, base.artifact).files):
        raise FailedPreconditionError(
            f"{base.name} has no {part}, which {field} needs",
            reason="BASE_LACKS_PART",
            metadata={"part": part, "field": field},
        )


def list_bases(session: Session) -> Sequence[BaseRow]:
    """Return all bases, by name."""
    return session.scalars(select(BaseRow).order_by(BaseRow.name)).all()


def _check_replaceable(session: Session, name: str, digest: str) -> None:
    row = session.get(BaseRow, name)
    if row is None or row.digest == digest:
        return
    for user in (ModelVersionRow, GenerationRow, RefinementRow):
        if session.scalar(select(user.name).where(user.base == name).limit(1)) is not None:
            raise AlreadyExistsError(
                f"{name} is another bundle, which earlier work depends on; "
                "TOILE_DEFAULT_BASE gives this one a name of its own",
                reason="BASE_CHANGED",
                metadata={"name": name, "digest": row.digest},
            )


def _check_architecture(
    what: str, has: Callable[[str], bool], unet_config: Callable[[], bytes]
) -> None:
    for required in _REQUIRED:
        if not has(required):
            raise _bad_base(f"{what} is no base bundle: it has no {required}")
    try:
        found = dict(json.loads(unet_config()))
    except (ValueError, TypeError) as error:
        raise _bad_base(f"{_UNET_CONFIG} of {what} is no configuration") from error
    found.setdefault("in_channels", 4)
    for key, needed in _SDXL_UNET.items():
        if found.get(key) != needed:
            raise _bad_base(
                f"{what} is no base of SDXL's architecture: {key} in {_UNET_CONFIG} is "
                f"{found.get(key)!r}, not {needed!r}"
            )


def _bad_base(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="base", reason="BAD_BASE")
