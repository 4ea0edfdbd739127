"""Engines compute on the GPU what torch computes in fp32."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tests.unit.diffusion.test_controls import random_controlnet

from toile.core.bases import bundle_digest
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.diffusion.engine_builders import EngineBuilder
from toile.diffusion.engine_runner import EngineRunner
from toile.diffusion.engines import EngineProfile
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import PARTS, UNET_CONTROL, NamedNetwork, Sizes, open_network
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import capability_here, keep_messages, load_library
from toile.diffusion.verification import LEAST_PSNR_DB, check

pytest.importorskip("onnx", reason="the engine extra is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
BASE = shipped_bundle_path()
SCRIPT = Path(__file__).parents[2] / "tensorrt" / "verify_engine.py"

Built = tuple[str, Path, NamedNetwork, NamedNetwork]


@pytest.fixture(scope="module", params=PARTS)
def built(
    request: pytest.FixtureRequest,
    builder: EngineBuilder,
    device: torch.device,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """Name, engine, the network in fp16 and in fp32."""
    part, folder = request.param, tmp_path_factory.mktemp("engine")
    nets: list[Path] = []
    if part == UNET_CONTROL:
        nets = [folder / "edges", folder / "depth"]
        for seed, path in enumerate(nets):
            unet = UNet2DConditionModel.from_pretrained(BASE / "unet")
            random_controlnet(unet, seed).save_pretrained(path)
    half = open_network(BASE, part, dtype=torch.float16, controlnets=nets)
    onnx = write_onnx(half, folder / f"{part}.onnx")
    engine = builder.build(
        onnx,
        folder / f"{part}.engine",
        profiles=[EngineProfile()],
        compute_capabilities=[capability_here()],
        base_digest=bundle_digest(BASE),
    )
    full = open_network(BASE, part, controlnets=nets)
    return part, engine.path, half.to(device), full.to(device)


def test_the_inspector_reads_an_engine_back(built: Built, builder: EngineBuilder) -> None:
    _, path, half, _ = built
    trt = load_library(builder.name)
    runtime = trt.Runtime(keep_messages(trt))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    inspector = engine.create_engine_inspector()
    found = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    assert engine.num_layers == len(found["Layers"]) > 0
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    assert names >= set(half.output_names)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_an_engine_agrees_with_torch(built: Built, batch: int) -> None:
    _, engine, half, full = built
    runner = EngineRunner(engine, base_digest=bundle_digest(BASE))
    for sizes in (Sizes(batch, rank=4), Sizes(batch, rank=64, latent_size=32)):
        found = check(runner, half, full, sizes, runs=1)
        assert found.least_psnr_db >= LEAST_PSNR_DB["fp16"]


def test_the_script_says_so(built: Built) -> None:
    part, engine, _, _ = built
    if part == UNET_CONTROL:
        pytest.skip("its ControlNets are in a folder of the fixture's own")
    done = subprocess.run(
        [sys.executable, SCRIPT, engine, "--part", part, "--runs", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


def test_a_batch_over_the_profile_is_refused(built: Built) -> None:
    _, engine, half, _ = built
    with pytest.raises(InvalidArgumentError) as caught:
        EngineRunner(engine)(half.example_inputs(Sizes(batch=17)))
    assert caught.value.reason == "SHAPE_OUT_OF_PROFILE"


def test_a_truncated_or_foreign_engine_is_refused(built: Built, tmp_path: Path) -> None:
    _, engine, _, _ = built
    runner = EngineRunner(engine)
    cut = tmp_path / engine.name
    cut.write_bytes(engine.read_bytes()[:-100])
    runner.fingerprint.save(cut)
    with pytest.raises(FailedPreconditionError) as caught:
        EngineRunner(cut)
    assert caught.value.reason == "ENGINE_BROKEN"
    replace(runner.fingerprint, builder_version="0").save(cut)
    cut.write_bytes(engine.read_bytes())
    with pytest.raises(FailedPreconditionError, match="was built by") as caught:
        EngineRunner(cut)
    assert caught.value.reason == "ENGINE_MISMATCH"
