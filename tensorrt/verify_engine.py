"""Compare an engine with torch, on a GPU; or an ONNX file, on a CPU.

python tensorrt/verify_engine.py out/engines/unet.engine
python tensorrt/verify_engine.py out/engines/unet.onnx

Prints JSON: for each batch the largest absolute difference and the PSNR of each output against
torch in fp32, and milliseconds a call (median, least, most) of the file and of torch. Without a GPU
an engine's header and fingerprint are checked, and `not_done` says what was not. The exit status is
1 when something does not hold.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from toile.core.bases import bundle_digest
from toile.core.errors import ToileError
from toile.diffusion.engine_runner import EngineRunner
from toile.diffusion.engines import Fingerprint, check_plan, onnx_digest
from toile.diffusion.networks import PARTS, PRECISIONS, Sizes, open_network
from toile.diffusion.quantization import FP8
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.verification import LEAST_PSNR_DB, check, onnx_evaluator


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="an .engine or an .onnx")
    parser.add_argument("--base", type=Path, default=shipped_bundle_path(), help="bundle folder")
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument(
        "--precision", choices=(*PRECISIONS, FP8), default="fp16", help="of the file"
    )
    parser.add_argument("--feed-forward", action="store_true", help="adapters there, too")
    parser.add_argument("--controlnet", type=Path, nargs="*", default=[], help="of unet_control")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--latent-size", type=int, default=0, help="the network's own if not given")
    parser.add_argument("--runs", type=int, default=10, help="calls that are timed")
    parser.add_argument("--least-psnr", type=float, help="dB; by precision if not given")
    arguments = parser.parse_args()
    try:
        found = verify(arguments)
    except ToileError as error:
        found = {"passed": False, "error": error.message, "reason": error.reason}
    print(json.dumps({"file": str(arguments.file), **found}))  # noqa: T201 - the script's output
    sys.exit(not found["passed"])


def verify(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the report."""
    is_engine = arguments.file.suffix != ".onnx"
    if is_engine and not torch.cuda.is_available():
        return without_gpu(arguments)
    device = torch.device("cuda" if is_engine else "cpu")
    if is_engine:
        runner = EngineRunner(arguments.file, base_digest=bundle_digest(arguments.base))
        evaluate, name = runner, torch.cuda.get_device_name()
    else:
        evaluate, name = onnx_evaluator(arguments.file), "cpu"
    options = {"feed_forward": arguments.feed_forward, "controlnets": arguments.controlnet}
    reference = open_network(arguments.base, arguments.part, **options).to(device)
    network = open_network(
        arguments.base, arguments.part, dtype=_dtype(arguments.precision), **options
    ).to(device)
    least = arguments.least_psnr
    if least is None:
        least = LEAST_PSNR_DB[arguments.precision]
    checks = [
        check(
            evaluate,
            network,
            reference,
            Sizes(batch, arguments.rank, arguments.latent_size),
            runs=arguments.runs,
        )
        for batch in arguments.batch
    ]
    if is_engine:
        runner.save_cache()
    return {
        "passed": all(one.least_psnr_db >= least for one in checks),
        "device": name,
        "least_psnr_db": least,
        "checks": [asdict(one) for one in checks],
    }


def _dtype(precision: str) -> torch.dtype:
    """Return what a file's inputs are of."""
    return PRECISIONS["fp16" if precision == FP8 else precision]


def without_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check what needs neither a GPU nor the library."""
    fingerprint = Fingerprint.load(arguments.file)
    check_plan(arguments.file)
    onnx = arguments.file.with_suffix(".onnx")
    problems = []
    if fingerprint.base_digest not in ("", bundle_digest(arguments.base)):
        problems.append("it was built from another base")
    if onnx.is_file() and onnx_digest(onnx) != fingerprint.onnx_digest:
        problems.append(f"it was not built from {onnx.name}")
    return {
        "passed": not problems,
        "problems": problems,
        "fingerprint": asdict(fingerprint),
        "not_done": ["parity", "speed", "compute capability"],
        "why_not": "there is no GPU here",
    }


if __name__ == "__main__":
    main()
