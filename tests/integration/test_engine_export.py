"""The exported UNet computes what torch does, and compiles, whatever the batch and the rank."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from tests.unit.diffusion.test_bank import SDXL_IN_SMALL
from tests.unit.diffusion.test_controls import random_controlnet

from integration.shipped_onnx import UNET_CONTROL, ShippedOnnx
from toile.core.errors import InvalidArgumentError
from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.engine_builders import EngineBuilder, open_builder
from toile.diffusion.engines import EngineProfile, Fingerprint, onnx_digest
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import (
    MODEL_INPUTS,
    REFINER,
    UNET,
    DenoisingNetwork,
    NamedNetwork,
    Sizes,
    open_network,
)
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import TENSORRT_RTX

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.timeout(900)

Exported = tuple[NamedNetwork, Path]
SLOWLY = pytest.mark.slow
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")


SDXL_TO_EXPORT = {
    **SDXL_IN_SMALL,
    # An export takes a processor some 35 ms for each node, so blocks are repeated less often.
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 1),
}


@pytest.fixture(scope="module", params=["tiny", pytest.param("sdxl", marks=SLOWLY)])
def kind(request: pytest.FixtureRequest) -> str:
    """The tiny base, or SDXL's configuration at reduced width."""
    return str(request.param)


@pytest.fixture(scope="module")
def unet(kind: str) -> UNet2DConditionModel:
    """In fp32, as ONNX Runtime takes it on a CPU."""
    torch.manual_seed(0)
    if kind == "sdxl":
        made = UNet2DConditionModel(**SDXL_TO_EXPORT)
    else:
        made = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / "unet")
    return made.float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def controlled(
    kind: str,
    unet: UNet2DConditionModel,
    shipped_onnx: ShippedOnnx,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """The same with a ControlNet; the one of reduced width with two."""
    if kind == "tiny":
        return shipped_onnx.network(UNET_CONTROL), shipped_onnx.file(UNET_CONTROL)
    nets = [random_controlnet(unet, seed) for seed in (1, 2)]
    network = DenoisingNetwork(BankedUNet(unet, bank_layout(unet), nets))
    return network, write_onnx(network, tmp_path_factory.mktemp("onnx") / "unet_control.onnx")


@pytest.fixture(scope="module")
def exported(
    kind: str, unet: UNet2DConditionModel, controlled: Exported, shipped_onnx: ShippedOnnx
) -> Exported:
    """The UNet alone. That of reduced width is in a graph whose ControlNets can be silent."""
    if kind == "tiny":
        return shipped_onnx.network("unet"), shipped_onnx.file("unet")
    return DenoisingNetwork(BankedUNet(unet, bank_layout(unet))), controlled[1]


@pytest.fixture(
    scope="module",
    params=[
        (UNET, torch.float32),
        (REFINER, torch.float32),
        pytest.param((UNET, torch.float16), marks=SLOWLY),
        pytest.param((REFINER, torch.float16), marks=SLOWLY),
    ],
    ids=lambda made: f"{made[0]}-{made[1]}",
)
def for_gpus(
    request: pytest.FixtureRequest,
    shipped_onnx: ShippedOnnx,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, tuple[str, ...]]:
    """A UNet, and the GPUs that take it: in fp16 all do; Turing multiplies no fp32 matrices."""
    name, dtype = request.param
    if dtype == torch.float32:
        return shipped_onnx.file(name), CAPABILITIES[1:]
    network = open_network(shipped_bundle_path(), name, dtype=dtype)
    return write_onnx(network, tmp_path_factory.mktemp("onnx") / "unet.onnx"), CAPABILITIES


@pytest.fixture(scope="module")
def rtx() -> EngineBuilder:
    pytest.importorskip("tensorrt_rtx_bindings")
    return open_builder(TENSORRT_RTX)


def evaluate(onnx: Path, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == list(inputs)
    names = [node.name for node in session.get_outputs()]
    values = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, values, strict=True))


def agree(
    network: NamedNetwork,
    onnx: Path,
    inputs: dict[str, torch.Tensor],
    silent: dict[str, torch.Tensor] | None = None,
) -> None:
    """Compare; what is silent goes to the graph alone, and must change nothing."""
    got, expected = evaluate(onnx, inputs | (silent or {})), network.run(inputs)
    assert list(got) == list(expected) == list(network.output_names)
    for name, tensor in expected.items():
        assert np.abs(got[name] - tensor.numpy()).max() <= 1e-4, name


def silent_controls(sample: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """What ControlNets take, at a scale of 0."""
    batch, _, height, width = sample.shape
    controls = {}
    for index in range(count):
        controls[f"control_image_{index}"] = torch.rand(batch, 3, 8 * height, 8 * width)
        controls[f"control_scale_{index}"] = torch.zeros(batch)
    return controls


def changes(network: NamedNetwork, inputs: dict[str, torch.Tensor], prefix: str) -> float:
    """How much the prediction moves when inputs are silent."""
    silent = {n: 0 * tensor if n.startswith(prefix) else tensor for n, tensor in inputs.items()}
    before, after = network.run(inputs)["prediction"], network.run(silent)["prediction"]
    return float((before - after).abs().max())


@pytest.mark.parametrize(
    "sizes", [Sizes(1, 1, 16), Sizes(2, 4, 17), Sizes(5, 24, 22, 154)], ids=["1", "2", "5"]
)
def test_onnx_runtime_computes_what_torch_does(kind: str, exported: Exported, sizes: Sizes) -> None:
    network, onnx = exported
    torch.manual_seed(sizes.batch)
    inputs = network.example_inputs(sizes)
    inputs["sample"] = inputs["sample"][..., :-3]  # not square
    assert list(inputs) == [*MODEL_INPUTS, *network.layout.input_names]
    agree(network, onnx, inputs, silent_controls(inputs["sample"], 2 if kind == "sdxl" else 0))
    assert changes(network, inputs, "up_") > 1e-2, "the bank does nothing"


@pytest.mark.parametrize("sizes", [Sizes(1, 1, 16), Sizes(3, 4, 19)], ids=["1", "3"])
def test_controlnets_are_in_the_graph(controlled: Exported, sizes: Sizes) -> None:
    network, onnx = controlled
    torch.manual_seed(sizes.batch)
    inputs = network.example_inputs(sizes)
    inputs["sample"] = inputs["sample"][..., :-5]
    scales = [name for name in inputs if name.startswith("control_scale_")]
    for index, name in enumerate(scales):
        image = f"control_image_{index}"
        inputs[image] = inputs[image][..., : -5 * PIXELS_PER_LATENT]
        inputs[name][0] = index  # the first sample has the first one off, the second on
    agree(network, onnx, inputs)
    for name in scales if sizes.batch > 1 else ():
        assert changes(network, inputs, name) > 1e-2, "a ControlNet does nothing"
    assert changes(network, inputs, "up_") > 1e-2


@SLOWLY
def test_tensorrt_for_rtx_compiles_controlnets(
    controlled: Exported, rtx: EngineBuilder, tmp_path: Path
) -> None:
    onnx = controlled[1]
    engine = tmp_path / "unet_control.engine"
    built = rtx.build(onnx, engine, profiles=[EngineProfile()], compute_capabilities=["8.9"])
    assert built.size_bytes > onnx.stat().st_size


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_the_other_networks_are_exported_and_compiled(
    rtx: EngineBuilder, tmp_path: Path, part: str
) -> None:
    network = open_network(shipped_bundle_path(), part)
    onnx = write_onnx(network, tmp_path / f"{part}.onnx")
    for sizes in (Sizes(1, latent_size=16), Sizes(5, latent_size=24)):
        torch.manual_seed(sizes.batch)
        agree(network, onnx, network.example_inputs(sizes))
    for dtype in (torch.float16, torch.bfloat16):
        other = open_network(shipped_bundle_path(), part, dtype=dtype)
        built = rtx.build(
            write_onnx(other, tmp_path / f"{part}-{dtype}.onnx"),
            tmp_path / f"{part}-{dtype}.engine",
            profiles=[EngineProfile()],
            compute_capabilities=["8.6", "12.0"],
        )
        assert built.size_bytes > 1 << 20


def test_tensorrt_for_rtx_compiles_it_without_a_gpu(
    for_gpus: tuple[Path, tuple[str, ...]], rtx: EngineBuilder, tmp_path: Path
) -> None:
    onnx, capabilities = for_gpus
    built = rtx.build(
        onnx,
        tmp_path / "unet.engine",
        profiles=[EngineProfile()],
        compute_capabilities=capabilities,
        base_digest="b" * 64,
    )
    data = built.path.read_bytes()
    assert len(data) == built.size_bytes > onnx.stat().st_size
    # The header of a plan: its magic, and its own size after 16 bytes.
    assert data[1:4] == b"trt"
    assert int.from_bytes(data[16:24], "little") == len(data)
    fingerprint = Fingerprint.load(built.path)
    assert fingerprint == built.fingerprint
    assert fingerprint.onnx_digest == onnx_digest(onnx)
    fingerprint.check(builder=TENSORRT_RTX, builder_version=rtx.version, compute_capability="8.6")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet.engine", "unet.json"]


def test_what_cannot_be_compiled_is_refused_and_leaves_nothing(
    rtx: EngineBuilder, tmp_path: Path
) -> None:
    onnx, engine = tmp_path / "in" / "broken.onnx", tmp_path / "out" / "unet.engine"
    onnx.parent.mkdir()
    onnx.write_bytes(b"no network")
    with pytest.raises(InvalidArgumentError, match=r"broken\.onnx is not parsed") as caught:
        rtx.build(onnx, engine, profiles=[EngineProfile()], compute_capabilities=["8.6"])
    assert caught.value.reason == "BAD_NETWORK"
    assert not engine.parent.exists()


@pytest.mark.parametrize("wanted", [(), ("9.0",), ("8.6", "x")])
def test_a_gpu_that_is_not_built_for_is_named_with_those_that_are(
    shipped_onnx: ShippedOnnx, rtx: EngineBuilder, tmp_path: Path, wanted: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"7\.5, 8\.0, 8\.6, 8\.9, 12\.0") as caught:
        rtx.build(
            shipped_onnx.file("unet"),
            tmp_path / "unet.engine",
            profiles=[EngineProfile()],
            compute_capabilities=wanted,
        )
    assert caught.value.reason == "BAD_COMPUTE_CAPABILITY"
