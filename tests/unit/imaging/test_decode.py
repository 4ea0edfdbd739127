import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from toile.core.errors import BadImageError
from toile.core.settings import Limits
from toile.imaging.decode import decode, probe
from unit.imaging.files import encoded, huge_png, picture


def reason_of(data: bytes | Path, **limits: int) -> str:
    with pytest.raises(BadImageError) as caught:
        decode(data, Limits(**limits))
    assert "\n" not in caught.value.message
    return caught.value.reason


@pytest.mark.parametrize(
    ("image_format", "media_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("TIFF", "image/tiff"),
        ("BMP", "image/bmp"),
        ("GIF", "image/gif"),
    ],
)
def test_each_format_is_read_by_its_content(
    image_format: str, media_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "named_wrongly.txt"
    path.write_bytes(encoded(picture(), image_format))
    info = probe(path)
    assert (info.media_type, info.width, info.height) == (media_type, 96, 80)
    image = decode(path)
    assert (image.mode, image.size, image.info) == ("RGB", (96, 80), {})
    difference = np.abs(np.asarray(image, int) - np.asarray(picture(), int))
    assert difference.mean() < 16  # GIF has 256 colours


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EMPTY_FILE"),
        (b"just some text, called photo.jpg", "NOT_AN_IMAGE"),
        (b"\xff\xd8\xff\xe0", "TRUNCATED_IMAGE"),
        (encoded(picture(), "JPEG")[:800], "TRUNCATED_IMAGE"),
        (encoded(picture())[:150], "TRUNCATED_IMAGE"),
        (encoded(picture())[:20], "TRUNCATED_IMAGE"),
        (encoded(picture(), "WEBP")[:100], "TRUNCATED_IMAGE"),
        (encoded(picture(), "GIF")[:900], "TRUNCATED_IMAGE"),
        (encoded(picture(), "TIFF")[:900], "TRUNCATED_IMAGE"),
        (encoded(picture(8, 200)), "TOO_SMALL"),
        (b"%PDF-1.7\n", "UNSUPPORTED_FORMAT"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "UNSUPPORTED_FORMAT"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "UNSUPPORTED_FORMAT"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(data: bytes, reason: str, tmp_path: Path) -> None:
    assert reason_of(data) == reason
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert reason_of(path) == reason


def test_a_hundred_megapixels_are_refused_without_decoding() -> None:
    data = huge_png(10_000, 10_000)
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        assert reason_of(data) == "TOO_MANY_PIXELS"
        assert reason_of(huge_png(30_000, 30_000)) == "TOO_MANY_PIXELS"
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_limits_are_exact() -> None:
    data = encoded(picture(100, 50))
    assert decode(data, Limits(image_pixels=5000, image_bytes=len(data))).size == (100, 50)
    assert reason_of(data, image_pixels=4999) == "TOO_MANY_PIXELS"
    assert reason_of(data, image_bytes=len(data) - 1) == "TOO_MANY_BYTES"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    data = encoded(picture(96, 64), "JPEG", exif=exif, quality=95)
    info = probe(data)
    assert (info.width, info.height) == (64, 96)
    image = decode(data)
    assert image.size == (64, 96)
    red = np.asarray(image, int)[:, :, 0]
    assert red[-1].mean() > red[0].mean() + 200, "what grew rightwards now grows downwards"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode(data).size == (96, 80)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    layer = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, 32, 64))
    image = decode(encoded(layer.convert(mode), "TIFF" if mode == "PA" else "PNG"))
    assert image.getpixel((8, 8)) == (0, 0, 0)
    assert image.getpixel((60, 8)) == (255, 255, 255)


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (32, 0, 64, 64))
    decoded = decode(encoded(image, "PNG", transparency=0))
    assert decoded.getpixel((8, 8)) == (255, 255, 255)
    assert decoded.getpixel((60, 8)) == (200, 100, 50)


def test_cmyk_jpeg() -> None:
    image = decode(encoded(picture().convert("CMYK"), "JPEG", quality=95))
    difference = np.abs(np.asarray(image, int) - np.asarray(picture(), int))
    assert difference.mean() < 6


def test_sixteen_bit_grey() -> None:
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    image = decode(encoded(Image.fromarray(ramp), "PNG"))
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((95, 63)) == (255, 255, 255)
    middle = image.getpixel((0, 32))
    assert isinstance(middle, tuple)
    assert abs(middle[0] - 128) <= 2


def test_floating_point_tiff() -> None:
    ramp = np.linspace(0.0, 1.0, 96 * 64, dtype=np.float32).reshape(64, 96)
    image = decode(encoded(Image.fromarray(ramp), "TIFF"))
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((95, 63)) == (255, 255, 255)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((5, 5)) == (255, 0, 0)


def test_several_pictures_in_one_jpeg_file() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(64, 64)])
    assert probe(data).media_type == "image/jpeg"
    assert decode(data).size == (96, 80)


def test_a_colour_profile_is_applied() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = decode(encoded(picture(), "PNG", icc_profile=lab))
    assert np.abs(np.asarray(same, int) - np.asarray(picture(), int)).max() <= 2
    broken = decode(encoded(picture(), "PNG", icc_profile=b"no profile at all"))
    assert np.array_equal(np.asarray(broken), np.asarray(picture()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damage
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    st.floats(0.0, 1.0),
)
def test_damage_is_always_a_typed_error_or_a_picture(
    image_format: str, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(encoded(picture(40, 40), image_format))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        outcome = decode(bytes(data[: int(kept * len(data)) + 1])).mode
    except BadImageError as error:
        outcome = error.reason
    assert outcome in {
        "RGB",
        "NOT_AN_IMAGE",
        "TRUNCATED_IMAGE",
        "TOO_MANY_PIXELS",
        "TOO_SMALL",
        "UNSUPPORTED_FORMAT",
    }


def test_bytes_and_paths_give_the_same(tmp_path: Path) -> None:
    data = encoded(picture(), "JPEG")
    path = tmp_path / "photo"
    path.write_bytes(data)
    assert decode(path).tobytes() == decode(data).tobytes()
    assert Image.open(io.BytesIO(data)).size == (96, 80)
