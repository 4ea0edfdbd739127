"""Images as a person names them: files, folders, or what the platform calls them."""

import hashlib
from pathlib import Path

from toile.cli.commands.common import Session
from toile.cli.names import short
from toile.core.errors import InvalidArgumentError, NotFoundError


def resolve_images(s: Session, texts: list[str], prompt: str = "") -> dict[str, str]:
    """Return image names with what the person called them.

    A file that the platform itself wrote, and that was not changed since, is the image it was
    written from, lineage and all; any other file is uploaded.

    Raises:
        InvalidArgumentError: A folder has no images, or a text is neither a file nor a name.
    """
    from toile.cli.folder import read_folder
    from toile.cli.operations import upload_image

    found: dict[str, str] = {}
    for text in texts:
        path = Path(text)
        if path.is_dir():
            files = [photograph.path for photograph in read_folder(path).photographs]
        elif path.is_file():
            files = [path]
        else:
            found[image_name(s, text)] = short(text)
            continue
        for file in files:
            name = known_image(s, file)
            if name is None:
                name = upload_image(s.clients, s.names.project, file, prompt).name
            found.setdefault(name, str(file))
    return found


def resolve_image(s: Session, text: str) -> str:
    """Return the name of one image; see `resolve_images`.

    Raises:
        InvalidArgumentError: It is a folder.
    """
    if Path(text).is_dir():
        raise InvalidArgumentError(f"{text} is a folder, not an image", field="image")
    (name,) = resolve_images(s, [text])
    return name


def image_name(s: Session, text: str) -> str:
    """Return the whole name of an image that is no file.

    Raises:
        InvalidArgumentError: It cannot be one.
    """
    try:
        return s.names.image(text)
    except InvalidArgumentError:
        raise InvalidArgumentError(
            f"{text} is neither a file nor the name of an image", field="image"
        ) from None


def known_image(s: Session, path: Path) -> str | None:
    """Return the name that a file's metadata gives it, if the platform has these very bytes."""
    from toile.imaging import formats
    from toile.v1 import generate_pb2

    data = path.read_bytes()
    try:
        told = formats.read(data).toile
        name = s.names.image(str((told or {})["image"]))
        image = s.clients.generate.GetImage(generate_pb2.GetImageRequest(name=name)).image
    except (InvalidArgumentError, NotFoundError, KeyError, ValueError, OSError, SyntaxError):
        return None
    return name if image.digest == hashlib.sha256(data).hexdigest() else None
