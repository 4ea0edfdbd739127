"""What evaluates the UNet in the server gives the same, whichever it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.diffusion import fake_tensorrt

from integration.shipped_onnx import ShippedOnnx
from toile.core.errors import InvalidArgumentError
from toile.diffusion.bank import BankError, PackedAdapter
from toile.diffusion.engines import EngineProfile, Fingerprint, onnx_digest
from toile.diffusion.networks import MODEL_INPUTS, DenoisingNetwork, Sizes
from toile.diffusion.tensorrt_library import TENSORRT_RTX
from toile.diffusion.triton.evaluators import EngineEvaluator, OnnxEvaluator, open_evaluator

pytest.importorskip("onnxruntime", reason="the engine extra is not installed")
RANKS = (4, 8, 2)


@pytest.fixture(scope="module")
def network(shipped_onnx: ShippedOnnx) -> DenoisingNetwork:
    return shipped_onnx.network("unet")


@pytest.fixture(scope="module")
def reference(shipped_onnx: ShippedOnnx, network: DenoisingNetwork) -> OnnxEvaluator:
    return OnnxEvaluator(shipped_onnx.file("unet"), network.layout, max_rank=64, threads=1)


@pytest.fixture
def evaluator(
    shipped_onnx: ShippedOnnx,
    network: DenoisingNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> EngineEvaluator:
    """Of a library that stands for TensorRT and computes on the processor."""
    here = "toile.diffusion.engine_runner"
    monkeypatch.setattr(f"{here}.load_library", lambda name: fake_tensorrt)
    monkeypatch.setattr(f"{here}.capability_here", lambda: "8.9")
    onnx, engine = shipped_onnx.file("unet"), tmp_path / "unet.engine"
    fingerprint = Fingerprint(
        builder=TENSORRT_RTX,
        builder_version=fake_tensorrt.__version__,
        compute_capabilities=("8.9",),
        profiles=(
            EngineProfile(batch=(1, 2, 4), latent_size=(8, 16, 16)),
            EngineProfile(batch=(1, 2, 2), latent_size=(8, 16, 32)),
        ),
        onnx_digest=onnx_digest(onnx),
    )
    fake_tensorrt.write_engine(onnx, engine, fingerprint)
    return EngineEvaluator(engine, network.layout, max_rank=16, device="cpu")


def adapters(network: DenoisingNetwork) -> list[PackedAdapter]:
    generator = np.random.default_rng(0)
    return [
        PackedAdapter(
            {
                f"{half}_{group.name}": generator.normal(
                    0, 0.1, (len(group.targets), *shape)
                ).astype(np.float32)
                for group in network.layout.groups
                for half, shape in (
                    ("down", (rank, group.in_features)),
                    ("up", (group.out_features, rank)),
                )
            }
        )
        for rank in RANKS
    ]


def inputs_of(network: DenoisingNetwork, sizes: Sizes) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    inputs = network.example_inputs(sizes)
    return {name: inputs[name].numpy() for name in MODEL_INPUTS}


def test_an_engine_gives_what_onnx_runtime_gives(
    evaluator: EngineEvaluator, reference: OnnxEvaluator, network: DenoisingNetwork
) -> None:
    inputs = inputs_of(network, Sizes(3))
    packed = adapters(network)

    def samples(engine: EngineEvaluator | OnnxEvaluator) -> list[list[tuple[PackedAdapter, float]]]:
        one, two, three = map(engine.place, packed)
        return [[(one, 0.5), (two, 1.0)], [], [(three, -1.0)]]

    got = evaluator.run(inputs, samples(evaluator))
    wanted = reference.run(inputs, samples(reference))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    without = reference.run(inputs, [[]] * 3)
    changed = np.abs(wanted - without).reshape(3, -1).max(axis=1)
    assert changed[0] > 1e-2
    assert changed[1] < 1e-5
    assert changed[2] > 1e-2


def test_adapters_lie_where_the_engine_has_its_inputs(
    evaluator: EngineEvaluator, network: DenoisingNetwork
) -> None:
    (adapter, *_) = adapters(network)
    placed = evaluator.place(adapter)
    assert all(isinstance(array, torch.Tensor) for array in placed.arrays.values())
    assert (placed.rank, placed.size_bytes) == (adapter.rank, adapter.size_bytes)


def test_ranks_over_the_engines_are_refused(
    evaluator: EngineEvaluator, network: DenoisingNetwork
) -> None:
    placed = [(evaluator.place(one), 1.0) for one in adapters(network)] * 2
    with pytest.raises(BankError, match="at most 16"):
        evaluator.run(inputs_of(network, Sizes(1)), [placed])


def test_as_many_samples_as_the_profiles_take(
    evaluator: EngineEvaluator, network: DenoisingNetwork
) -> None:
    sizes = {(16, 16): 4, (8, 16): 4, (24, 16): 2, (8, 32): 2, (8, 40): 1}
    assert {size: evaluator.most_samples(*size) for size in sizes} == sizes
    with pytest.raises(InvalidArgumentError) as caught:
        evaluator.run(inputs_of(network, Sizes(1, latent_size=40)), [[]])
    assert caught.value.reason == "SHAPE_OUT_OF_PROFILE"


def test_kernels_are_kept_when_the_server_ends(
    evaluator: EngineEvaluator, network: DenoisingNetwork, tmp_path: Path
) -> None:
    evaluator.run(inputs_of(network, Sizes(1)), [[]])
    evaluator.close()
    assert (tmp_path / "unet.cache").read_bytes() == b"kernels"


def test_what_is_opened_goes_by_the_suffix(
    shipped_onnx: ShippedOnnx,
    network: DenoisingNetwork,
    evaluator: EngineEvaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx = open_evaluator(shipped_onnx.file("unet"), network.layout, max_rank=64, threads=1)
    assert isinstance(onnx, OnnxEvaluator)
    monkeypatch.setattr(
        "toile.diffusion.triton.evaluators.EngineEvaluator",
        lambda path, layout, *, max_rank: (path.name, max_rank),
    )
    found = open_evaluator(tmp_path / "unet.engine", network.layout, max_rank=8, threads=1)
    assert found == ("unet.engine", 8)
