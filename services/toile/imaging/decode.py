"""Judge and decode image files that somebody else made.

A file is judged by its bytes, never by its name. Everything that can be told from the header is
told before a pixel is decoded, so that a small file that unfolds into gigabytes costs nothing.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from toile.core.errors import BadImageError
from toile.core.settings import Limits

MIN_SIDE_PIXELS = 16
"""Shorter sides hold nothing to see or to learn from."""

_MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # what phones write: a JPEG with further pictures behind it
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
}
_FORMATS = tuple(name for name in _MEDIA_TYPES if name != "MPO")  # opened as JPEG

_SIGNATURES: tuple[tuple[int, bytes], ...] = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (8, b"WEBP"),
    (0, b"GIF87a"),
    (0, b"GIF89a"),
    (0, b"II*\0"),
    (0, b"MM\0*"),
)
_OTHER_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or other XML"),
    (0, b"\0\0\1\0", "icon"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
)

# What Pillow's decoders raise for bytes that end early or make no sense.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)

_ROTATED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageInfo:
    """What a file's header says. Width and height in pixels, as the picture is seen upright."""

    media_type: str
    width: int
    height: int


def probe(
    data: bytes | Path, limits: Limits | None = None, *, min_side_pixels: int = MIN_SIDE_PIXELS
) -> ImageInfo:
    """Judge a file by its header alone.

    Raises:
        BadImageError: As `decode`, but for damage that only decoding shows.
    """
    with _open(data, limits or Limits(), min_side_pixels) as image:
        return _info(image)


def decode(
    data: bytes | Path,
    limits: Limits | None = None,
    *,
    min_side_pixels: int = MIN_SIDE_PIXELS,
    backdrop: str = "white",
) -> Image.Image:
    """Decode a file to an upright RGB image with 8 bits a channel, sRGB where a profile says how.

    Transparency is laid over the backdrop's colour; of an animation the first frame is taken.

    Raises:
        BadImageError: With reason EMPTY_FILE, NOT_AN_IMAGE, UNSUPPORTED_FORMAT, TRUNCATED_IMAGE,
            TOO_MANY_BYTES, TOO_MANY_PIXELS or TOO_SMALL.
    """
    with _open(data, limits or Limits(), min_side_pixels) as image:
        try:
            image.load()
        except _DAMAGE as error:
            raise _truncated() from error
        return _to_rgb(_upright(image), backdrop)


def _open(data: bytes | Path, limits: Limits, min_side_pixels: int) -> Image.Image:
    size_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
    if not size_bytes:
        raise BadImageError("the file is empty", reason="EMPTY_FILE")
    if size_bytes > limits.image_bytes:
        raise BadImageError(
            f"the file has {size_bytes:,} bytes, {limits.image_bytes:,} are allowed",
            reason="TOO_MANY_BYTES",
        )
    image = _identify(data, limits)
    width, height = image.size
    if width * height > limits.image_pixels:
        image.close()
        raise _too_many_pixels(f"{width} x {height}", limits)
    if min(width, height) < min_side_pixels:
        image.close()
        raise BadImageError(
            f"the image has {width} x {height} pixels, "
            f"at least {min_side_pixels} a side are needed",
            reason="TOO_SMALL",
        )
    return image


def _identify(data: bytes | Path, limits: Limits) -> Image.Image:
    source = data if isinstance(data, Path) else io.BytesIO(data)
    try:
        return Image.open(source, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels("far more", limits) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except _DAMAGE as error:
        raise _truncated() from error


def _unidentified(data: bytes | Path) -> BadImageError:
    if isinstance(data, Path):
        with data.open("rb") as file:
            head = file.read(32)
    else:
        head = data[:32]
    if any(head[at : at + len(mark)] == mark for at, mark in _SIGNATURES):
        return _truncated()
    for at, mark, name in _OTHER_FORMATS:
        if head[at : at + len(mark)] == mark:
            return BadImageError(
                f"{name} files are not read; convert it to JPEG or PNG", reason="UNSUPPORTED_FORMAT"
            )
    return BadImageError("the file is not an image", reason="NOT_AN_IMAGE")


def _truncated() -> BadImageError:
    return BadImageError("the image is cut off or damaged", reason="TRUNCATED_IMAGE")


def _too_many_pixels(size: str, limits: Limits) -> BadImageError:
    return BadImageError(
        f"the image has {size} pixels, {limits.image_pixels:,} in all are allowed",
        reason="TOO_MANY_PIXELS",
    )


def _info(image: Image.Image) -> ImageInfo:
    width, height = image.size
    # A PNG may carry EXIF behind the pixels; looking for it there would decode them.
    if "exif" in image.info and image.getexif().get(_ORIENTATION) in _ROTATED:
        width, height = height, width
    return ImageInfo(_MEDIA_TYPES[image.format or "JPEG"], width, height)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE:  # damaged EXIF is no reason to lose the picture
        return image


def _to_rgb(image: Image.Image, backdrop: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, backdrop)
        return Image.alpha_composite(ground, layer).convert("RGB")
    return _to_srgb(image)


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile and image.mode in {"RGB", "CMYK", "L"}:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None  # a profile that lcms refuses: take the values as they are
        if converted is not None:
            return _bare(converted)
    return _bare(image.convert("RGB"))


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(values.max())
    if image.mode.startswith("I;16") or largest > 255.0:
        values = values / max(257.0, largest / 255.0)
    elif image.mode == "F" and largest <= 1.0:
        values = values * 255.0
    grey = Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))
    return grey.convert("RGB")


def _bare(image: Image.Image) -> Image.Image:
    """Drop what the file said beside its pixels: profile, EXIF, comments."""
    bare = image.copy()
    bare.info.clear()
    return bare
