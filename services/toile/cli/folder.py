"""A folder of photographs, as it is imported."""

from dataclasses import dataclass
from pathlib import Path

from toile.core.errors import InvalidArgumentError, NotFoundError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif",
    ".tiff", ".webp",
})
# fmt: on
_CAPTION_SUFFIX = ".txt"


@dataclass(frozen=True)
class Photograph:
    """A file to import. `name` is its path within the folder."""

    path: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Folder:
    """What was found. `skipped` are files that do not claim to be images or captions."""

    photographs: tuple[Photograph, ...]
    skipped: tuple[str, ...]


def read_folder(folder: Path) -> Folder:
    """Find the image files of a folder and of those within it, with the captions beside them.

    Whether a file that claims to be an image is one, the dataset service decides.

    Raises:
        NotFoundError: There is no such folder.
        InvalidArgumentError: It holds no image files (`EMPTY_FOLDER`).
    """
    if not folder.exists():
        raise NotFoundError(f"there is no folder {folder}")
    root = folder.parent if folder.is_file() else folder
    paths = [folder] if folder.is_file() else sorted(_files(folder))
    photographs = tuple(
        Photograph(path, path.relative_to(root).as_posix(), _caption(path))
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not photographs:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InvalidArgumentError(
            f"no image files are in {folder} (looked for {kinds})",
            field="path",
            reason="EMPTY_FOLDER",
        )
    known = {*IMAGE_SUFFIXES, _CAPTION_SUFFIX}
    skipped = tuple(
        path.relative_to(root).as_posix() for path in paths if path.suffix.lower() not in known
    )
    return Folder(photographs, skipped)


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _caption(path: Path) -> str:
    beside = path.with_suffix(_CAPTION_SUFFIX)
    if not beside.is_file():
        return ""
    return " ".join(beside.read_text(encoding="utf-8", errors="replace").split())
