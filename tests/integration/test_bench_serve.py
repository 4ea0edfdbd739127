"""The benchmark of drawing through Triton runs; what it measures is nobody's promise here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.shipped_onnx import ShippedOnnx
from toile.diffusion.triton.server import TritonEnvironment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(results: Path) -> str:
    code = "import json, sys, serve.render as r; print(r.render(json.load(open(sys.argv[1]))))"
    return python("-c", code, str(results))


def test_the_smallest_run_measures_what_is_rendered(
    triton_environment: TritonEnvironment, shipped_onnx: ShippedOnnx, tmp_path: Path
):
    del triton_environment
    results = tmp_path / "results.json"
    what = ("--part", "mixed", "continuous", "modelled", "resident", "--scale", "smallest")
    onnx = shipped_onnx.file("unet")
    python("-m", "serve", *what, "--onnx", str(onnx), "--out", str(results))
    found = json.loads(results.read_text(encoding="utf-8"))
    mixed = found["mixed"]
    assert mixed["clients"]["2"]["images_per_second"]["a LoRA each"]["median"] > 0
    assert set(mixed["peers"]["toile_over"]) >= {"set_adapters, fp32", "load and fuse, fp32"}
    shared, alone = (
        found["continuous"]["saturation"]["triton"][name]["samples_per_call"]["median"]
        for name in ("shared", "alone")
    )
    assert shared > alone == 2
    asked = found["continuous"]["mix"]["servers"]
    assert set(asked) == {"continuous", "whole requests", "one at a time"}
    assert all(one["latency_seconds"] for one in asked.values()), "nothing was drawn"
    assert {"512", "1024"} < set(found["modelled"])
    resident = found["resident"]
    assert set(resident["first_step"]) == {"8", "16", "64"}
    memory = resident["memory"]
    assert memory["loads"] == memory["switches"], "an adapter was not new, or not loaded"
    assert memory["evictions"] == memory["loads"] - memory["held"]
    text = rendered(results)
    assert text.count("| 64 |") == 1
    assert f"{memory['evictions']:.0f} evictions" in text
    assert text.count("####") == 4
