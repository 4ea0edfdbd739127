"""`python -m serve`: measure figures of drawing through Triton, and render them.

Run by `make bench-serve`, with `benchmarks` on PYTHONPATH.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import machine
from measuring.readme import replace_part
from serve import continuous, mixed, modelled, overhead, platform_mixed, resident
from serve.bench import Bench
from serve.engine import Exported, export_once
from serve.render import render
from serve.scale import FULL, SCALES

from toile.cli.platform.triton_parts import open_environment
from toile.core.settings import Settings
from toile.diffusion.bundle import Bundle, shipped_bundle_path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
OUT = ROOT / "out" / "bench-serve"

PARTS: dict[str, dict[str, Callable[[Bench], dict[str, Any]]]] = {
    "1": {"overhead": overhead.measure},
    "2": {"mixed": mixed.measure, "mixed_platform": platform_mixed.measure},
    "3": {"continuous": continuous.measure, "modelled": modelled.measure},
    "4": {"resident": resident.measure},
}
"""What is measured for each figure; each part is in the results under its own name."""


def main() -> None:
    """Measure, write and render."""
    arguments = _arguments()
    results = arguments.out or (RESULTS if arguments.scale == FULL.name else OUT / "results.json")
    found: dict[str, Any] = {}
    if results.is_file():
        found = json.loads(results.read_text(encoding="utf-8"))
    quiet = machine.wait_until_quiet(arguments.wait) if arguments.wait else None
    bundle_path = shipped_bundle_path()
    if bundle_path is None:
        sys.exit("this installation has no tiny base")
    environment = open_environment(Settings())
    bundle = Bundle.load(bundle_path)
    _say("the engine")
    onnx = arguments.onnx or export_once(bundle, OUT / "engines")
    parts = {name: part for figure in arguments.figure for name, part in PARTS[figure].items()}
    with tempfile.TemporaryDirectory(prefix="toile-bench-") as scratch:
        for name, measure in parts.items():
            if arguments.part and name not in arguments.part:
                continue
            _say(name)
            with machine.watched() as run:
                bench = Bench(
                    scale=SCALES[arguments.scale],
                    scratch=Path(scratch),
                    home=OUT / "home",
                    bundle=bundle,
                    exported=Exported.of(bundle, onnx),
                    environment=environment,
                    threads=SCALES[arguments.scale].threads or len(os.sched_getaffinity(0)),
                    say=_say,
                    run=run,
                )
                measured = measure(bench)
            found[name] = {
                "run": {**run, "scale": arguments.scale, "waited_until_quiet": quiet},
                "machine": {
                    **machine.facts(),
                    "triton_versions": machine.triton_versions(environment.site_packages),
                },
                **measured,
            }
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(json.dumps(_plain(found), indent=1) + "\n", encoding="utf-8")
    if results == RESULTS:
        replace_part("serve", render(found))
    _say(f"written to {results}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument("--figure", nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    names = [name for parts in PARTS.values() for name in parts]
    parser.add_argument("--part", nargs="+", choices=names, help="parts of those figures alone")
    parser.add_argument("--scale", choices=sorted(SCALES), default=FULL.name)
    parser.add_argument(
        "--quick", action="store_const", dest="scale", const="quick", help="--scale quick"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, help="minutes to wait for a quiet machine, at most"
    )
    parser.add_argument(
        "--onnx", type=Path, help="the base's UNet, exported already; exported here if not given"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"results; {RESULTS.name} beside the code for a full run, else under {OUT.name}",
    )
    return parser.parse_args()


def _plain(value: Any) -> Any:
    """Round floats to six digits, which is more than they mean; JSON has no infinities."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
