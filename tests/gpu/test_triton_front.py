"""The real Triton draws on the GPU what is drawn in process."""

from pathlib import Path

import pytest
import torch

from integration.test_triton import adapter, decibels, request_for
from toile.cli.platform.ports import free_ports
from toile.core.artifacts.local import LocalStore
from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.engine_builders import EngineBuilder
from toile.diffusion.engines import serving_profiles
from toile.diffusion.export import export_onnx
from toile.diffusion.pipelines import diffuse
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import TENSORRT_RTX, capability_here
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.packed import PackedFiles
from toile.diffusion.triton.repository import write_model
from toile.diffusion.triton.server import TritonEnvironment, TritonPorts, TritonServer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-triton"


def test_an_engine_in_the_front_draws_the_images_of_the_in_process_pipeline(
    builder: EngineBuilder, tmp_path: Path
) -> None:
    if builder.name != TENSORRT_RTX:
        pytest.skip("nvidia-pytriton has no TensorRT backend, which runs plans of TensorRT proper")
    environment = TritonEnvironment.open(ENVIRONMENT)
    if not (environment.site_packages / "torch").is_dir():
        pytest.skip("the server's environment has no torch; `make triton-gpu` adds it")
    bundle = Bundle.load(shipped_bundle_path(), digest="d" * 64)
    layout = bank_layout(bundle.unet)
    half = Bundle.load(shipped_bundle_path(), digest="d" * 64).unet.to(torch.float16)
    onnx = export_onnx(BankedUNet(half, layout), tmp_path / "unet.onnx")
    built = builder.build(
        onnx,
        tmp_path / "unet.engine",
        profiles=serving_profiles(
            native_size=16, largest_size=32, batch=16, batch_pixels=16 * 16 * 16, rank=64
        ),
        compute_capabilities=[capability_here()],
        base_digest=bundle.digest,
    )
    names = write_model(
        tmp_path / "models",
        "unet",
        engine=built.path,
        layout=layout,
        unet_config=bundle.unet.config,
        time_ids=6,
        pooled_width=128,
    )
    ports = TritonPorts(*free_ports("127.0.0.1", 2))
    log = tmp_path / "triton.log"
    server = TritonServer(environment, tmp_path / "models", ports, names, log)
    server.start(timeout_seconds=120)
    try:
        denoiser = TritonDenoiser(
            server.address,
            unet_config=dict(bundle.unet.config),
            layout=layout,
            link=PackedFiles(LocalStore(tmp_path / "store"), layout).link,
        )
        for adapters in ([], [adapter(bundle, 1)], [adapter(bundle, 1), adapter(bundle, 2)]):
            wanted = request_for(adapters)
            (ours,) = diffuse(bundle, denoiser, wanted)
            (theirs,) = diffuse(bundle, TorchDenoiser(bundle, bfloat16=False), wanted)
            assert decibels(ours, theirs) >= 35  # halves, over six steps
    finally:
        server.stop()
    assert (tmp_path / "models" / "unet" / "1" / "unet.cache").stat().st_size > 0
