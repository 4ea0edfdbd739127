"""Compile an exported network for GPUs; with tensorrt-rtx no GPU is needed.

python tensorrt/build_engine.py --onnx out/engines/unet.onnx --compute-capability 8.6 8.9

Says first how much memory the engine will want on a GPU (see `toile.diffusion.engine_memory`).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from toile.core.bases import bundle_digest
from toile.core.errors import ToileError
from toile.diffusion.engine_builders import open_builder
from toile.diffusion.engine_memory import estimate_memory
from toile.diffusion.engines import BUILDER, CAPABILITY, EngineProfile
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import TENSORRT, TENSORRT_RTX

RANGES = tuple(field.name for field in fields(EngineProfile))


def main() -> None:
    """Write the engine, and its fingerprint beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the engine; beside the ONNX file if not given")
    parser.add_argument("--builder", choices=(TENSORRT_RTX, TENSORRT), default=TENSORRT_RTX)
    parser.add_argument("--compute-capability", nargs="*", default=[], metavar="8.6")
    for name in RANGES:
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            nargs=3,
            action="append",
            metavar=("LEAST", "TUNED", "MOST"),
            help="given again: of a further profile, which has the last of what it is not given",
        )
    parser.add_argument(
        "--base", type=Path, default=shipped_bundle_path(), help="bundle folder it was exported of"
    )
    parser.add_argument(
        "--vram-limit", type=float, metavar="GB", help="build nothing that will want more"
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        help="of tensorrt: file that keeps what it measured, for the next engine on the same GPU",
    )
    arguments = parser.parse_args()
    try:
        profiles = _profiles(vars(arguments))
        memory = estimate_memory(arguments.onnx, profiles)
        print(f"estimated GPU memory: {memory}", file=sys.stderr)  # noqa: T201
        if arguments.vram_limit:
            memory.check(int(arguments.vram_limit * 1e9))
        built = open_builder(arguments.builder).build(
            arguments.onnx,
            arguments.out or arguments.onnx.with_suffix(".engine"),
            profiles=profiles,
            compute_capabilities=arguments.compute_capability,
            base_digest=bundle_digest(arguments.base),
            rebuild=_command(arguments, profiles),
            timing_cache=arguments.timing_cache,
        )
    except ToileError as error:
        sys.exit(f"error: {error.message}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    facts = {
        "engine": str(built.path),
        "bytes": built.size_bytes,
        "seconds": round(built.seconds, 1),
        "estimated_memory_bytes": memory.total,
    }
    print(json.dumps(facts))  # noqa: T201 - the script's output


def _command(arguments: argparse.Namespace, profiles: Sequence[EngineProfile]) -> str:
    """Return the command that builds the same for what it is told in place of this."""
    ranges = [
        word
        for profile in profiles
        for name in RANGES
        for word in ("--" + name.replace("_", "-"), *map(str, getattr(profile, name)))
    ]
    paths = ["--onnx", str(arguments.onnx), "--base", str(arguments.base)]
    if arguments.out:
        paths += ["--out", str(arguments.out)]
    what = f"--builder {BUILDER} --compute-capability {CAPABILITY}"
    return f"python tensorrt/build_engine.py {shlex.join(paths)} {what} {shlex.join(ranges)}"


def _profiles(given: Mapping[str, Any]) -> list[EngineProfile]:
    """Return as many as the range has that was given most often."""
    default = EngineProfile()
    ranges = {name: given[name] or [getattr(default, name)] for name in RANGES}
    return [
        EngineProfile(
            **{name: tuple(many[min(index, len(many) - 1)]) for name, many in ranges.items()}
        )
        for index in range(max(len(many) for many in ranges.values()))
    ]


if __name__ == "__main__":
    main()
