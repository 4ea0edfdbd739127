"""Export and compile SDXL's UNet at full size, with random weights, on a machine without a GPU.

Each stage is a process of its own, so that what one needs is gone before the next. A stage is ended
when it leaves the machine less than 2 GB. results.json holds, of each stage, seconds, peak memory
and what it wrote; a stage that was ended says so.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).with_name("results.json")
LEAST_AVAILABLE_BYTES = 2 << 30
STAGES = ("export", "build")


def export(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the ONNX file."""
    import torch

    from toile.diffusion.banked_unet import BankedUNet, bank_layout
    from toile.diffusion.export import write_onnx
    from toile.diffusion.networks import DenoisingNetwork
    from toile.diffusion.random_sdxl import MINIATURE_UNET_CONFIG, SDXL_UNET_CONFIG, random_unet

    config = MINIATURE_UNET_CONFIG if arguments.miniature else SDXL_UNET_CONFIG
    started = time.monotonic()
    unet = random_unet(config, dtype=torch.float16)
    made = time.monotonic()
    network = DenoisingNetwork(BankedUNet(unet, bank_layout(unet)))
    write_onnx(network, folder / "unet.onnx")
    return {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "seconds_to_make_weights": made - started,
        "seconds_to_export": time.monotonic() - made,
        "onnx_bytes": sum(path.stat().st_size for path in folder.glob("unet.onnx*")),
    }


def build(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile it for batches 1 to 8 of 1024 pixels with adapters of rank 16 in all."""
    from toile.diffusion.engine_builders import open_builder
    from toile.diffusion.engine_memory import estimate_memory
    from toile.diffusion.engines import EngineProfile
    from toile.diffusion.tensorrt_library import TENSORRT_RTX

    side = 16 if arguments.miniature else 128
    profile = EngineProfile(
        batch=(1, 2, 8), rank=(1, 16, 16), latent_size=(side, side, side), tokens=(77, 77, 77)
    )
    memory = estimate_memory(folder / "unet.onnx", [profile])
    built = open_builder(TENSORRT_RTX).build(
        folder / "unet.onnx",
        folder / "unet.engine",
        profiles=[profile],
        compute_capabilities=arguments.compute_capability,
    )
    return {
        "engine_bytes": built.size_bytes,
        "seconds_to_build": built.seconds,
        "builder_version": built.fingerprint.builder_version,
        "compute_capabilities": built.fingerprint.compute_capabilities,
        "profile": asdict(profile),
        "estimated_gpu_bytes": asdict(memory),
    }


def run_stage(stage: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a stage in a process of its own, and end it before the machine is out of memory."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    command += ["--compute-capability", *arguments.compute_capability]
    command += ["--miniature"] * arguments.miniature
    available = psutil.virtual_memory().available
    started, least, ended = time.monotonic(), available, False
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None:
        least = min(least, psutil.virtual_memory().available)
        if least < arguments.least_available_bytes:
            os.killpg(process.pid, signal.SIGKILL)
            ended = True
            break
        time.sleep(0.2)
    output = process.communicate()[0]
    found = {
        "stage": stage,
        "seconds": time.monotonic() - started,
        "available_bytes_before": available,
        "least_available_bytes": least,
    }
    if ended:
        return {**found, "ended": "the machine had too little memory left"}
    if process.returncode:
        return {**found, "ended": f"exit status {process.returncode}"}
    return {**found, **json.loads(output.splitlines()[-1])}


def main() -> None:
    """Run all stages, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compute-capability", nargs="+", default=["8.9"])
    parser.add_argument("--miniature", action="store_true", help="try the program on a small UNet")
    parser.add_argument("--keep", type=Path, help="folder to leave ONNX and engine in")
    parser.add_argument("--least-available-bytes", type=int, default=LEAST_AVAILABLE_BYTES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        found = {"export": export, "build": build}[arguments.stage](arguments.folder, arguments)
        # Linux counts in KiB.
        found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps(found))
        return
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="toile-engine-"))
    stages = []
    try:
        for stage in STAGES:
            stages.append(run_stage(stage, folder, arguments))
            print(json.dumps(stages[-1]), flush=True)
            if "ended" in stages[-1]:
                break
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    results = {
        "miniature": arguments.miniature,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": os.getloadavg()[0],
        },
        "stages": stages,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if "ended" in stages[-1]:
        sys.exit(f"error: {stages[-1]['stage']}: {stages[-1]['ended']}")


if __name__ == "__main__":
    main()
