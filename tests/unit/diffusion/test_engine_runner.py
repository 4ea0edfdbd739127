"""Engines are opened where they fit, and take and give torch tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.diffusion import fake_tensorrt

from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.diffusion.engine_runner import EngineRunner
from toile.diffusion.engines import EngineProfile, Fingerprint, onnx_digest
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import NamedNetwork, Sizes, open_network
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import TENSORRT_RTX

pytest.importorskip("onnxruntime", reason="the engine extra is not installed")


@pytest.fixture(scope="module")
def network() -> NamedNetwork:
    """The smallest network with an input that is no float and more than one output."""
    return open_network(shipped_bundle_path(), "text_encoder_2")


@pytest.fixture(scope="module")
def onnx(network: NamedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(network, tmp_path_factory.mktemp("onnx") / "text.onnx")


@pytest.fixture
def fingerprint(onnx: Path) -> Fingerprint:
    return Fingerprint(
        builder=TENSORRT_RTX,
        builder_version=fake_tensorrt.__version__,
        compute_capabilities=("8.9",),
        profiles=(EngineProfile(),),
        onnx_digest=onnx_digest(onnx),
        base_digest="b" * 64,
    )


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and a library, both made up."""
    here = "toile.diffusion.engine_runner"
    monkeypatch.setattr(f"{here}.load_library", lambda name: fake_tensorrt)
    monkeypatch.setattr(f"{here}.capability_here", lambda: "8.9")


@pytest.fixture
def engine(onnx: Path, fingerprint: Fingerprint, tmp_path: Path) -> Path:
    path = tmp_path / "text.engine"
    fake_tensorrt.write_engine(onnx, path, fingerprint)
    return path


def test_an_engine_gives_what_its_network_gives(network: NamedNetwork, engine: Path):
    runner = EngineRunner(engine, base_digest="b" * 64, device="cpu")
    assert runner.input_names == ("input_ids",)
    assert runner.output_names == network.output_names
    for batch in (1, 3):
        inputs = network.example_inputs(Sizes(batch=batch))
        got = runner({"input_ids": inputs["input_ids"].int(), "unused": torch.zeros(1)})
        torch.testing.assert_close(got, network.run(inputs), atol=1e-4, rtol=0)


def test_kernels_are_kept_for_the_next_time(network: NamedNetwork, engine: Path):
    first = EngineRunner(engine, device="cpu")
    first(network.example_inputs())
    first.save_cache()
    assert engine.with_suffix(".cache").read_bytes() == b"kernels"
    EngineRunner(engine, device="cpu").save_cache()
    assert engine.with_suffix(".cache").read_bytes() == b"kernels"
    engine.with_suffix(".cache").write_bytes(b"of another GPU")
    EngineRunner(engine, device="cpu").save_cache()
    assert engine.with_suffix(".cache").read_bytes() == b""


def test_inputs_that_it_was_not_built_for_are_refused(network: NamedNetwork, engine: Path):
    runner = EngineRunner(engine, device="cpu")
    with pytest.raises(InvalidArgumentError, match="needs the input input_ids"):
        runner({})
    with pytest.raises(InvalidArgumentError) as caught:
        runner(network.example_inputs(Sizes(batch=5)))
    assert caught.value.reason == "SHAPE_OUT_OF_PROFILE"


def test_the_first_profile_that_takes_the_shapes_is_chosen(
    network: NamedNetwork, engine: Path, fingerprint: Fingerprint
):
    profiles = (EngineProfile(batch=(1, 1, 2)), EngineProfile(batch=(1, 1, 3)))
    replace(fingerprint, profiles=profiles).save(engine)
    runner = EngineRunner(engine, device="cpu")
    for batch, chosen in ((1, 0), (3, 1), (2, 0), (3, 1)):
        runner(network.example_inputs(Sizes(batch=batch)))
        assert runner._context.profile == chosen
    with pytest.raises(InvalidArgumentError, match="not built for") as caught:
        runner(network.example_inputs(Sizes(batch=4)))
    assert caught.value.reason == "SHAPE_OUT_OF_PROFILE"


def test_an_engine_for_something_else_is_not_opened(engine: Path, fingerprint: Fingerprint):
    replace(fingerprint, compute_capabilities=("7.5",)).save(engine)
    with pytest.raises(
        FailedPreconditionError, match=r"built for compute capability 7\.5"
    ) as caught:
        EngineRunner(engine, device="cpu")
    assert caught.value.reason == "ENGINE_MISMATCH"
    fingerprint.save(engine)
    with pytest.raises(FailedPreconditionError, match="another base"):
        EngineRunner(engine, base_digest="c" * 64, device="cpu")


def test_a_broken_engine_is_not_opened(engine: Path):
    data = engine.read_bytes()
    engine.write_bytes(data[:-1])
    with pytest.raises(FailedPreconditionError, match="says that it has") as caught:
        EngineRunner(engine, device="cpu")
    assert caught.value.reason == "ENGINE_BROKEN"
    engine.write_bytes(data[:24] + bytes(len(data) - 24))
    with pytest.raises(FailedPreconditionError, match="cannot be opened") as caught:
        EngineRunner(engine, device="cpu")
    assert caught.value.reason == "ENGINE_BROKEN"


def test_a_machine_without_a_gpu_is_said_so(engine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr("toile.diffusion.engine_runner.load_library", lambda name: fake_tensorrt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPreconditionError) as caught:
        EngineRunner(engine)
    assert caught.value.reason == "NO_GPU"
