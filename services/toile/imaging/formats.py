"""PNG, WebP and JPEG with the same metadata: `parameters` for other tools, Toile's own JSON.

A PNG holds them as text chunks (see `png`). WebP and JPEG hold them as EXIF: `parameters` in
UserComment, in UTF-16 after the mark `UNICODE`, which is how AUTOMATIC1111's web UI writes and
reads it (by way of `piexif.helper`, big-endian); Toile's JSON, in UTF-8, in MakerNote, the tag that
EXIF leaves to whoever made the picture.
"""

import io
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from toile.imaging import png
from toile.imaging.png import Metadata, Parameters, format_parameters, parse_json

_UNICODE = b"UNICODE\0"
_TOILE = b"TOILE\0"


class ImageFormat(Enum):
    """How an image is encoded; the value is its media type."""

    PNG = "image/png"
    WEBP = "image/webp"
    JPEG = "image/jpeg"


def encode(
    image: Image.Image,
    image_format: ImageFormat = ImageFormat.PNG,
    *,
    quality: int = 90,
    parameters: Parameters | None = None,
    toile: Mapping[str, Any] | None = None,
) -> bytes:
    """Encode an image with its metadata. Equal input gives equal bytes.

    Args:
        image: RGB.
        image_format: How.
        quality: 1 to 100; of no effect for PNG, lossless for WebP at 100.
        parameters: How it was drawn.
        toile: Lineage.
    """
    if image_format is ImageFormat.PNG:
        return png.encode(image, parameters=parameters, toile=toile)
    bare = image.copy()
    bare.info.clear()
    buffer = io.BytesIO()
    exif = _exif(parameters, toile)
    if image_format is ImageFormat.WEBP:
        bare.save(buffer, "WEBP", quality=quality, lossless=quality == 100, exif=exif)
    else:
        # Full colour resolution: thin threads of a strong colour would lose it otherwise.
        bare.save(buffer, "JPEG", quality=quality, subsampling=0, exif=exif)
    return buffer.getvalue()


def read(data: bytes | Path) -> Metadata:
    """Read the metadata of an image file; what is not there or not readable counts as absent.

    Raises:
        OSError: The file cannot be opened, or is no image of these formats.
    """
    source = data if isinstance(data, Path) else io.BytesIO(data)
    try:
        with Image.open(source, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.format == "PNG":
                return png.read(data)
            tags = dict(image.getexif().get_ifd(ExifTags.IFD.Exif))
    except (SyntaxError, ValueError) as error:
        raise UnidentifiedImageError("the image is damaged") from error
    return Metadata(
        parameters=_read_parameters(tags.get(ExifTags.Base.UserComment)),
        toile=_read_toile(tags.get(ExifTags.Base.MakerNote)),
    )


def _exif(parameters: Parameters | None, toile: Mapping[str, Any] | None) -> Image.Exif:
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    if parameters is not None:
        text = format_parameters(parameters)
        tags[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be", "replace")
    if toile is not None:
        text = json.dumps(toile, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        tags[ExifTags.Base.MakerNote] = _TOILE + text.encode("utf-8", "replace")
    return exif


def _read_parameters(comment: object) -> Parameters | None:
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    text = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return png.parse_parameters(text)


def _read_toile(note: object) -> dict[str, Any] | None:
    if not isinstance(note, bytes) or not note.startswith(_TOILE):
        return None
    return parse_json(note.removeprefix(_TOILE).decode("utf-8", "replace"))
