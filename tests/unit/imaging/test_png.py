import io
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from toile.imaging import png
from toile.imaging.png import Parameters
from unit.imaging.files import picture

GOLDEN = (
    "white floral lace dress, <lace>\n"
    "soft light\n"
    "Negative prompt: blurry, low quality\n"
    "Steps: 20, Sampler: Euler, CFG scale: 4.5, Seed: 7, Size: 128x256, Model hash: 0a1b2c3d4e, "
    'Model: tiny, Adapters: "lace:0.8, silk:0.5", Version: toile 0.1.0'
)
PARAMETERS = Parameters(
    prompt="white floral lace dress, <lace>\nsoft light",
    negative_prompt="blurry, low quality",
    steps=20,
    sampler="Euler",
    cfg_scale=4.5,
    seed=7,
    width=128,
    height=256,
    model_hash="0a1b2c3d4e",
    model="tiny",
    version="toile 0.1.0",
    extra={"Adapters": "lace:0.8, silk:0.5"},
)


def test_the_text_is_exactly_what_other_tools_read() -> None:
    assert png.format_parameters(PARAMETERS) == GOLDEN
    assert png.parse_parameters(GOLDEN) == PARAMETERS


def test_metadata_survives_the_file() -> None:
    lineage = {"image": "projects/p/images/i", "seed": 7, "adapters": [{"weight": 0.8}], "ü": "✓"}
    data = png.encode(picture(), parameters=PARAMETERS, toile=lineage)
    assert png.read(data) == png.Metadata(PARAMETERS, lineage)
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["parameters"] == GOLDEN
        assert np.array_equal(np.asarray(image), np.asarray(picture()))


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    image = picture()
    image.info["dpi"] = (300, 300)
    first = png.encode(image, parameters=PARAMETERS, toile={"a": 1, "b": 2})
    assert first == png.encode(picture(), parameters=PARAMETERS, toile={"b": 2, "a": 1})
    path = tmp_path / "image.png"
    path.write_bytes(first)
    assert png.read(path) == png.read(first)


def test_a_file_of_another_tool() -> None:
    text = (
        "a cat\nNegative prompt: dog\nSteps: 30, Sampler: DPM++ 2M, Schedule type: Karras, "
        'CFG scale: 7, Seed: 1234567890, Size: 512x768, Model hash: abc, Model: "x, y", '
        'Lora hashes: "lace: 1a2b, silk: 3c4d", Version: v1.9.3'
    )
    parameters = png.parse_parameters(text)
    assert (parameters.prompt, parameters.negative_prompt) == ("a cat", "dog")
    assert (parameters.steps, parameters.sampler, parameters.seed) == (30, "DPM++ 2M", 1234567890)
    assert (parameters.width, parameters.height, parameters.model) == (512, 768, "x, y")
    assert parameters.extra == {
        "Schedule type": "Karras",
        "Lora hashes": "lace: 1a2b, silk: 3c4d",
    }


def test_text_that_is_not_what_it_should_be_does_no_harm() -> None:
    assert png.parse_parameters("only a prompt").prompt == "only a prompt"
    assert png.parse_parameters("a\nSteps: many, Size: big, Seed: x").steps == 0
    buffer = io.BytesIO()
    info = png.PngImagePlugin.PngInfo()
    info.add_text("toile", "{broken")
    picture().save(buffer, "PNG", pnginfo=info)
    assert png.read(buffer.getvalue()) == png.Metadata(None, None)


text = st.text(max_size=60)
setting = st.text(max_size=30)
prompts = text.filter(lambda t: not any(x.startswith("Negative prompt: ") for x in t.split("\n")))


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        Parameters,
        prompt=prompts,
        negative_prompt=text,
        steps=st.integers(0, 10**6),
        sampler=setting,
        cfg_scale=st.floats(-1e6, 1e6).map(lambda x: float(format(x, ".15g"))),
        seed=st.integers(-(2**63), 2**63 - 1),
        width=st.integers(0, 10**5),
        height=st.integers(0, 10**5),
        model_hash=setting,
        model=setting,
        version=setting,
        extra=st.dictionaries(
            st.sampled_from(["Refiner", "Adapters", "Denoising strength"]),
            setting.filter(bool),
        ),
    )
)
def test_round_trip(parameters: Parameters) -> None:
    assert png.parse_parameters(png.format_parameters(parameters)) == parameters
    data = png.encode(Image.new("RGB", (1, 1)), parameters=parameters)
    assert png.read(data).parameters == parameters


def test_a_file_of_the_first_release_is_still_read() -> None:
    metadata = png.read(Path(__file__).parent / "golden" / "metadata.png")
    assert metadata.parameters == PARAMETERS
    assert metadata.toile == {
        "format": 1,
        "image": "projects/p/images/i",
        "adapters": [{"model": "projects/p/models/lace/versions/1", "weight": 0.8}],
    }
