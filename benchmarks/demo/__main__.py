"""Run the sample loop several times from nothing; write results.json with medians and spread.

Each run has a home and an output folder of its own, so nothing is kept from the one before. The
figures are those that the loop itself measures and prints (`toile/cli/loop/figures.py`).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
FIGURES = ("total_seconds", "up_seconds", "peak_memory_bytes")


def run_once(scratch: Path) -> dict[str, Any]:
    """Run the loop in `scratch` and return its figures."""
    loop = scratch / "examples" / "lace"
    shutil.copytree(ROOT / "examples" / "lace", loop)
    toile = Path(sys.executable).with_name("toile")
    command = [str(toile), "run", str(loop / "loop.yaml"), "--json"]
    environment = {**os.environ, "TOILE_HOME": str(scratch / "home")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    del figures["out"]  # a scratch folder
    return figures


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return median, least and most of each figure and of each step's seconds."""
    series = {name: [float(run[name]) for run in runs] for name in FIGURES}
    for step in (step["name"] for step in runs[0]["steps"]):
        series[f"step {step} seconds"] = [
            next(float(s["seconds"]) for s in run["steps"] if s["name"] == step) for run in runs
        ]
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in series.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = []
    for number in range(parser.parse_args().runs):
        with tempfile.TemporaryDirectory(prefix="toile-bench-") as scratch:
            runs.append(run_once(Path(scratch)))
        print(f"run {number + 1}: {runs[-1]['total_seconds']:.0f} s", file=sys.stderr)
    results = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
        },
        "runs": runs,
        "summary": summarize(runs),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, figure in results["summary"].items():
        print(
            f"{name:28} {figure['median']:>16,.1f}  ({figure['min']:,.1f} to {figure['max']:,.1f})"
        )


if __name__ == "__main__":
    main()
