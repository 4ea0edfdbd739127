"""Compile an exported UNet for GPUs; with tensorrt-rtx no GPU is needed.

python tensorrt/build_engine.py --onnx out/engines/unet.onnx --compute-capability 8.6 8.9
"""

import argparse
import json
import sys
from pathlib import Path

from toile.core.errors import ToileError
from toile.diffusion.engine_builders import TENSORRT, TENSORRT_RTX, open_builder
from toile.diffusion.engines import EngineProfile


def main() -> None:
    """Write the engine, and its fingerprint beside it."""
    default = EngineProfile()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the engine; beside the ONNX file if not given")
    parser.add_argument("--builder", choices=(TENSORRT_RTX, TENSORRT), default=TENSORRT_RTX)
    parser.add_argument("--compute-capability", nargs="*", default=[], metavar="8.6")
    for name in ("batch", "rank", "latent_size", "tokens"):
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            nargs=3,
            metavar=("LEAST", "TUNED", "MOST"),
            default=getattr(default, name),
        )
    parser.add_argument("--base-digest", default="")
    arguments = parser.parse_args()
    try:
        profile = EngineProfile(
            batch=tuple(arguments.batch),
            rank=tuple(arguments.rank),
            latent_size=tuple(arguments.latent_size),
            tokens=tuple(arguments.tokens),
        )
        built = open_builder(arguments.builder).build(
            arguments.onnx,
            arguments.out or arguments.onnx.with_suffix(".engine"),
            profile=profile,
            compute_capabilities=arguments.compute_capability,
            base_digest=arguments.base_digest,
        )
    except ToileError as error:
        sys.exit(f"error: {error.message}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    facts = {
        "engine": str(built.path),
        "bytes": built.size_bytes,
        "seconds": round(built.seconds, 1),
    }
    print(json.dumps(facts))  # noqa: T201 - the script's output


if __name__ == "__main__":
    main()
