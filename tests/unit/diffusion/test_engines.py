from pathlib import Path

import pytest

from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.diffusion.engine_builders import open_builder
from toile.diffusion.engines import (
    BUILDER,
    CAPABILITY,
    NEAREST,
    EngineProfile,
    Fingerprint,
    check_plan,
    nearest_size,
    onnx_digest,
    serving_profiles,
)
from toile.diffusion.tensorrt_library import TENSORRT, TENSORRT_RTX
from toile.diffusion.triton import denoiser as triton_denoiser
from toile.diffusion.triton.client import TritonRefusedError

FINGERPRINT = Fingerprint(
    builder=TENSORRT_RTX,
    builder_version="1.7.1",
    compute_capabilities=("8.6", "8.9"),
    profiles=(EngineProfile(batch=(1, 4, 8)), EngineProfile(batch=(1, 2, 2))),
    onnx_digest="a" * 64,
    base_digest="b" * 64,
    rebuild=f"build --with {BUILDER} --for {CAPABILITY}",
)
HERE = {"builder": TENSORRT_RTX, "builder_version": "1.7.1", "compute_capability": "8.9"}


def test_a_profile_gives_each_input_its_shapes():
    profile = EngineProfile(batch=(1, 2, 4), rank=(1, 8, 16), latent_size=(16, 16, 32))
    assert profile.shapes("sample", (-1, 4, -1, -1)) == (
        (1, 4, 16, 16),
        (2, 4, 16, 16),
        (4, 4, 32, 32),
    )
    assert profile.shapes("down_64_64", (-1, 30, -1, 64))[2] == (4, 30, 16, 64)
    assert profile.shapes("up_64_64", (-1, 30, 64, -1))[1] == (2, 30, 64, 8)
    assert profile.shapes("encoder_hidden_states", (-1, -1, 256))[2] == (4, 231, 256)
    assert profile.shapes("control_image_1", (-1, 3, -1, -1))[2] == (4, 3, 256, 256)
    assert profile.shapes("latents", (-1, 4, -1, -1))[0] == (1, 4, 16, 16)
    assert profile.shapes("input_ids", (-1, 77))[2] == (4, 77)
    with pytest.raises(ValueError, match="batch"):
        EngineProfile(batch=(2, 1, 4))


@pytest.mark.parametrize(
    ("native", "largest", "wanted"),
    [
        (128, 256, [(16, (8, 64, 64)), (8, (8, 128, 128)), (2, (8, 256, 256))]),
        (128, 300, [(16, (8, 64, 64)), (8, (8, 128, 128)), (2, (8, 300, 300))]),
        (128, 128, [(16, (8, 64, 64)), (8, (8, 128, 128))]),
        (16, 256, [(16, (8, 16, 64)), (8, (8, 128, 128)), (2, (8, 256, 256))]),
        (16, 24, [(16, (8, 16, 24))]),
        (16, 16, [(16, (8, 16, 16))]),
    ],
)
def test_small_pictures_are_served_in_large_batches_and_large_ones_in_small(
    native: int, largest: int, wanted: list[tuple[int, tuple[int, int, int]]]
) -> None:
    profiles = serving_profiles(
        native_size=native, largest_size=largest, batch=16, batch_pixels=8 * 128 * 128, rank=32
    )
    assert {one.rank for one in profiles} == {(1, 16, 32)}
    assert [(one.batch[2], one.latent_size) for one in profiles] == wanted
    for height, width in ((8, largest), (largest, largest), (native, native), (8, 8)):
        assert any(one.takes({"sample": (2, 4, height, width)}) for one in profiles)
    assert not any(one.takes({"sample": (2, 4, largest + 1, 8)}) for one in profiles)


def test_a_profile_takes_shapes_within_it() -> None:
    profile = EngineProfile(batch=(1, 2, 4), latent_size=(8, 16, 32), tokens=(77, 77, 154))
    assert profile.takes({"sample": (4, 4, 8, 32), "encoder_hidden_states": (4, 154, 64)})
    assert not profile.takes({"sample": (5, 4, 8, 32)})
    assert not profile.takes({"sample": (4, 4, 8, 40)})
    assert not profile.takes({"encoder_hidden_states": (4, 231, 64)})
    assert not profile.takes({"down_64_64": (1, 30, 65, 64)})


def test_a_fingerprint_comes_back_as_it_was(tmp_path: Path):
    FINGERPRINT.save(tmp_path / "unet.engine")
    assert Fingerprint.load(tmp_path / "unet.engine") == FINGERPRINT


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"profiles": [{"batch": [3, 2, 1]}]}', '{"profiles": [1]}']
)
def test_an_engine_without_a_readable_fingerprint_is_refused(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "unet.json").write_text(text)
    with pytest.raises(FailedPreconditionError) as caught:
        Fingerprint.load(tmp_path / "unet.engine")
    assert caught.value.reason == "ENGINE_UNKNOWN"


def test_an_engine_that_was_built_for_what_is_here_is_taken():
    FINGERPRINT.check(**HERE)
    FINGERPRINT.check(**HERE, base_digest="b" * 64)


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ({"builder_version": "1.8.0"}, "1.8.0 is here"),
        ({"builder": TENSORRT}, "tensorrt 1.7.1 is here"),
        ({"compute_capability": "9.0"}, "8.6, 8.9, and 9.0 is here"),
        ({"base_digest": "c" * 64}, "another base"),
    ],
)
def test_an_engine_for_something_else_is_refused_with_the_command(differs, says):
    with pytest.raises(FailedPreconditionError, match=says) as caught:
        FINGERPRINT.check(**{**HERE, **differs})
    assert caught.value.reason == "ENGINE_MISMATCH"
    capability = differs.get("compute_capability", "8.9")
    command = f"build --with {differs.get('builder', TENSORRT_RTX)} --for {capability}"
    assert caught.value.message.endswith(command)
    assert caught.value.metadata["command"] == command


def test_the_digest_covers_the_data_beside_the_network(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(b"network")
    alone = onnx_digest(tmp_path / "a.onnx")
    (tmp_path / "a.onnx.data").write_bytes(b"weights")
    assert onnx_digest(tmp_path / "a.onnx") != alone


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 40, b"vtrt" + bytes(12) + (99).to_bytes(8, "little") + bytes(40)],
    ids=["empty", "other", "cut"],
)
def test_a_file_that_is_no_whole_engine_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "unet.engine").write_bytes(data)
    with pytest.raises(FailedPreconditionError) as caught:
        check_plan(tmp_path / "unet.engine")
    assert caught.value.reason == "ENGINE_BROKEN"


def test_an_unknown_builder_is_refused():
    with pytest.raises(InvalidArgumentError, match="tensorrt-rtx"):
        open_builder("openvino")


def test_tensorrt_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "toile.diffusion.tensorrt_library._MODULES", {TENSORRT: ("no_such_module",)}
    )
    with pytest.raises(FailedPreconditionError) as caught:
        open_builder(TENSORRT)
    assert caught.value.reason == "NO_ENGINE_BUILDER"


def test_the_nearest_size_is_one_that_a_profile_takes() -> None:
    profiles = (
        EngineProfile(latent_size=(8, 16, 32)),
        EngineProfile(latent_size=(64, 64, 128)),
    )
    assert nearest_size(profiles, 16, 24) == (16, 24)
    assert nearest_size(profiles, 4, 40) == (8, 32)
    assert nearest_size(profiles, 60, 200) == (64, 128)


def test_a_size_that_the_server_does_not_take_is_told_with_the_nearest() -> None:
    message = f"the engine failed: SHAPE_OUT_OF_PROFILE: not built for it; {NEAREST}512x768"
    error = triton_denoiser._meaning(TritonRefusedError(message, 500))
    assert isinstance(error, InvalidArgumentError)
    assert (error.reason, error.metadata["nearest"]) == ("SHAPE_OUT_OF_PROFILE", "512x768")
    assert error.metadata["field"] == "width"
