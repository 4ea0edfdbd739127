import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from toile.imaging import formats, png
from toile.imaging.formats import ImageFormat
from toile.imaging.png import Metadata, Parameters

PARAMETERS = Parameters(
    prompt="a red dress, café ✂ 👗", negative_prompt="blurry", steps=20, seed=7, width=8, height=8
)
LINEAGE = {"image": "projects/p/images/i", "prompt": "café 👗", "adapters": [{"weight": 0.8}]}


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("image_format", ImageFormat)
def test_every_format_carries_the_same_metadata(image_format: ImageFormat, tmp_path: Path) -> None:
    data = formats.encode(picture(), image_format, parameters=PARAMETERS, toile=LINEAGE)
    assert formats.read(data) == Metadata(PARAMETERS, LINEAGE)
    path = tmp_path / "image"
    path.write_bytes(data)
    assert formats.read(path) == Metadata(PARAMETERS, LINEAGE)
    with Image.open(io.BytesIO(data)) as image:
        assert image.get_format_mimetype() == image_format.value
        assert image.size == (48, 32)
    assert data == formats.encode(picture(), image_format, parameters=PARAMETERS, toile=LINEAGE)


@pytest.mark.parametrize("image_format", [ImageFormat.WEBP, ImageFormat.JPEG])
def test_other_tools_find_the_parameters_where_they_look(image_format: ImageFormat) -> None:
    data = formats.encode(picture(), image_format, parameters=PARAMETERS)
    with Image.open(io.BytesIO(data)) as image:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    # As piexif.helper.UserComment.load reads it.
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf_16_be") == png.format_parameters(PARAMETERS)


def test_quality_is_bytes_for_looks() -> None:
    for image_format in (ImageFormat.WEBP, ImageFormat.JPEG):
        sizes = [len(formats.encode(picture(), image_format, quality=q)) for q in (10, 50, 95)]
        assert sizes == sorted(sizes)
    lossless = formats.encode(picture(), ImageFormat.WEBP, quality=100)
    with Image.open(io.BytesIO(lossless)) as image:
        assert (np.asarray(image.convert("RGB")) == np.asarray(picture())).all()


def test_a_file_without_metadata_has_none() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        picture().save(buffer, kind)
        assert formats.read(buffer.getvalue()) == Metadata()


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe1"])
def test_what_is_no_image_is_an_os_error(data: bytes) -> None:
    with pytest.raises(OSError, match=r"."):
        formats.read(data)


def test_a_comment_of_somebody_else_is_no_metadata() -> None:
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    tags[ExifTags.Base.UserComment] = b"ASCII\0\0\0hello"
    tags[ExifTags.Base.MakerNote] = b"TOILE\0{broken"
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=exif)
    assert formats.read(buffer.getvalue()) == Metadata()
