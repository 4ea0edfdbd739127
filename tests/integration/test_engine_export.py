"""The exported UNet computes what torch does, and compiles, whatever the batch and the rank."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from tests.unit.diffusion.test_bank import SDXL_IN_SMALL

from toile.core.errors import InvalidArgumentError
from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.engine_builders import TENSORRT_RTX, EngineBuilder, open_builder
from toile.diffusion.engines import EngineProfile, Fingerprint, onnx_digest
from toile.diffusion.export import MODEL_INPUTS, OUTPUT_NAME, example_inputs, export_onnx, run
from toile.diffusion.shipped import shipped_bundle_path

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@dataclass(frozen=True, eq=False)
class Exported:
    banked: BankedUNet
    onnx: Path
    time_ids: int = 6


@pytest.fixture(scope="module", params=["tiny", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """In fp32, as ONNX Runtime takes it on a CPU."""
    torch.manual_seed(0)
    if request.param == "sdxl":
        unet = UNet2DConditionModel(**{**SDXL_IN_SMALL, "transformer_layers_per_block": (1, 1, 2)})
    else:
        unet = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / "unet")
    return export(unet.float(), tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module", params=["unet", "refiner/unet"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """In fp16, as GPUs take it; Turing multiplies no fp32 matrices."""
    unet = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / request.param)
    folder = tmp_path_factory.mktemp("onnx")
    return export(unet.half(), folder, time_ids=5 if "refiner" in request.param else 6)


def export(unet: UNet2DConditionModel, folder: Path, time_ids: int = 6) -> Exported:
    unet.eval().requires_grad_(False)
    banked = BankedUNet(unet, bank_layout(unet))
    return Exported(banked, export_onnx(banked, folder / "unet.onnx", time_ids=time_ids), time_ids)


@pytest.fixture(scope="module")
def rtx() -> EngineBuilder:
    pytest.importorskip("tensorrt_rtx_bindings")
    return open_builder(TENSORRT_RTX)


def test_onnx_runtime_computes_what_torch_does(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.onnx, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    assert names == [*MODEL_INPUTS, *exported.banked.layout.input_names]
    assert [node.name for node in session.get_outputs()] == [OUTPUT_NAME]
    for batch, rank, size, tokens in ((1, 1, 16, 77), (2, 4, 16, 77), (5, 24, 24, 154)):
        torch.manual_seed(batch)
        inputs = example_inputs(
            exported.banked,
            batch=batch,
            rank=rank,
            size=size,
            tokens=tokens,
            time_ids=exported.time_ids,
        )
        inputs["sample"] = inputs["sample"][..., : size - 8]  # not square
        expected = run(exported.banked, inputs).numpy()
        got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        assert np.abs(got - expected).max() <= 1e-4
        silent = {name: 0 * t if name.startswith("up_") else t for name, t in inputs.items()}
        changed = np.abs(run(exported.banked, silent).numpy() - expected).max()
        assert changed > 1e-2, "the bank does nothing"


def test_tensorrt_for_rtx_compiles_it_without_a_gpu(
    half: Exported, rtx: EngineBuilder, tmp_path: Path
) -> None:
    capabilities = ("7.5", "8.0", "8.6", "8.9", "12.0")
    built = rtx.build(
        half.onnx,
        tmp_path / "unet.engine",
        profile=EngineProfile(),
        compute_capabilities=capabilities,
        base_digest="b" * 64,
    )
    data = built.path.read_bytes()
    assert len(data) == built.size_bytes > half.onnx.stat().st_size
    # The header of a plan: its magic, and its own size after 16 bytes.
    assert data[1:4] == b"trt"
    assert int.from_bytes(data[16:24], "little") == len(data)
    fingerprint = Fingerprint.load(built.path)
    assert fingerprint == built.fingerprint
    assert fingerprint.onnx_digest == onnx_digest(half.onnx)
    fingerprint.check(builder=TENSORRT_RTX, builder_version=rtx.version, compute_capability="8.6")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet.engine", "unet.json"]


def test_what_cannot_be_compiled_is_refused_and_leaves_nothing(
    rtx: EngineBuilder, tmp_path: Path
) -> None:
    onnx, engine = tmp_path / "in" / "broken.onnx", tmp_path / "out" / "unet.engine"
    onnx.parent.mkdir()
    onnx.write_bytes(b"no network")
    with pytest.raises(InvalidArgumentError, match=r"broken\.onnx is not parsed") as caught:
        rtx.build(onnx, engine, profile=EngineProfile(), compute_capabilities=["8.6"])
    assert caught.value.reason == "BAD_NETWORK"
    assert not engine.parent.exists()


@pytest.mark.parametrize("wanted", [(), ("9.0",), ("8.6", "x")])
def test_a_gpu_that_is_not_built_for_is_named_with_those_that_are(
    half: Exported, rtx: EngineBuilder, tmp_path: Path, wanted: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"7\.5, 8\.0, 8\.6, 8\.9, 12\.0") as caught:
        rtx.build(
            half.onnx,
            tmp_path / "unet.engine",
            profile=EngineProfile(),
            compute_capabilities=wanted,
        )
    assert caught.value.reason == "BAD_COMPUTE_CAPABILITY"
