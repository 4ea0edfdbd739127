"""A UNet in FP8 draws nearly what it drew, with adapters untouched, in half of the space."""

from pathlib import Path

import onnx
import pytest
import torch

from integration.shipped_onnx import ShippedOnnx
from toile.core.errors import InvalidArgumentError
from toile.diffusion.bundle import Bundle
from toile.diffusion.engine_builders import open_builder
from toile.diffusion.engines import EngineProfile
from toile.diffusion.networks import DenoisingNetwork, Sizes
from toile.diffusion.pipelines import DiffusionRequest
from toile.diffusion.quantization import Sample, calibration, quantize_fp8, quantized_nodes, record
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import TENSORRT_RTX
from toile.diffusion.verification import Evaluate, Parity, onnx_evaluator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TYPES = onnx.TensorProto


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path(), digest="d" * 64)


@pytest.fixture(scope="module")
def network(shipped_onnx: ShippedOnnx) -> DenoisingNetwork:
    return shipped_onnx.network("unet")


@pytest.fixture(scope="module")
def quantized(
    bundle: Bundle,
    network: DenoisingNetwork,
    shipped_onnx: ShippedOnnx,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "unet.onnx"
    return quantize_fp8(shipped_onnx.file("unet"), out, network.layout, calibration(bundle))


@pytest.fixture(scope="module")
def drawing(bundle: Bundle) -> list[Sample]:
    """Inputs of a drawing that nothing was measured on."""
    return record(bundle, [DiffusionRequest("a blue striped shirt", [77], steps=5)])


def evaluated(
    evaluate: Evaluate, network: DenoisingNetwork, sample: Sample, *, adapters: bool
) -> torch.Tensor:
    torch.manual_seed(0)
    inputs = network.example_inputs(Sizes(len(sample["sample"]), rank=4))
    inputs |= {name: torch.from_numpy(array.copy()) for name, array in sample.items()}
    strength = 10.0 if adapters else 0.0
    inputs |= {name: strength * t for name, t in inputs.items() if name.startswith("up_")}
    return evaluate(inputs)["prediction"]


def test_predictions_are_nearly_the_same(
    quantized: Path, shipped_onnx: ShippedOnnx, network: DenoisingNetwork, drawing: list[Sample]
) -> None:
    fp8, full = onnx_evaluator(quantized, 1), onnx_evaluator(shipped_onnx.file("unet"), 1)
    assert {float(sample["timestep"][0]) for sample in drawing} == {999, 799, 599, 399, 199}
    for sample in drawing:
        got = evaluated(fp8, network, sample, adapters=False)
        wanted = evaluated(full, network, sample, adapters=False)
        assert 35 < Parity.of(got, wanted).psnr_db < 70, "or nothing was quantized"


def test_adapters_change_it_as_they_did(
    quantized: Path, shipped_onnx: ShippedOnnx, network: DenoisingNetwork, drawing: list[Sample]
) -> None:
    changes = []
    for path in (quantized, shipped_onnx.file("unet")):
        evaluate = onnx_evaluator(path, 1)
        with_them, without = (
            evaluated(evaluate, network, drawing[2], adapters=there) for there in (True, False)
        )
        changes.append(with_them - without)
    assert changes[1].abs().max() > 0.4
    assert Parity.of(*changes).psnr_db > 25


def test_what_matters_most_and_costs_least_is_left_alone(
    quantized: Path, shipped_onnx: ShippedOnnx
) -> None:
    before, after = (onnx.load(str(p)).graph for p in (shipped_onnx.file("unet"), quantized))
    kinds = {tensor.name: tensor.data_type for tensor in after.initializer}
    for left in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_1"):
        assert kinds[f"banked.unet.{left}.weight"] == TYPES.FLOAT
    resnet = "banked.unet.down_blocks.0.resnets.0"
    assert kinds[f"{resnet}.time_emb_proj.weight"] == TYPES.FLOAT
    assert kinds[f"{resnet}.conv1.weight_e4m3"] == TYPES.FLOAT8E4M3FN
    assert f"{resnet}.conv1.weight" not in kinds, "it is there twice"
    pairs = [node for node in after.node if node.op_type == "QuantizeLinear"]
    wanted = quantized_nodes(before)
    assert len(pairs) == len({node.input[0] for node in wanted}) > 50
    assert [(v.name, v.type) for v in before.input] == [(v.name, v.type) for v in after.input]
    assert [(v.name, v.type) for v in before.output] == [(v.name, v.type) for v in after.output]
    assert quantized.stat().st_size < shipped_onnx.file("unet").stat().st_size / 2
    assert not list(shipped_onnx.file("unet").parent.glob("*.measured.onnx"))


def test_tensorrt_for_rtx_compiles_it_for_gpus_that_have_fp8(
    quantized: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the rtx extra is not installed")
    builder, engine = open_builder(TENSORRT_RTX), tmp_path / "unet.engine"
    profiles = [EngineProfile()]
    built = builder.build(quantized, engine, profiles=profiles, compute_capabilities=["8.9"])
    assert built.size_bytes > 1 << 20
    with pytest.raises(InvalidArgumentError, match="fp8"):  # Ampere has none
        builder.build(quantized, engine, profiles=profiles, compute_capabilities=["8.6"])
