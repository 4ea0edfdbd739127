"""The benchmark of drawing through Triton runs; what it measures is nobody's promise here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


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


def measured(results: Path, *parts: str) -> dict[str, Any]:
    if not (ROOT / ".venv-triton").is_dir():
        pytest.skip("there is no .venv-triton; `make triton` makes it")
    python("-m", "serve", "--part", *parts, "--scale", "smallest", "--out", str(results))
    return json.loads(results.read_text(encoding="utf-8"))


def rendered(results: Path) -> str:
    code = "import json, sys, serve.render as r; print(r.render(json.load(open(sys.argv[1]))))"
    return python("-c", code, str(results))


def test_the_smallest_run_measures_what_is_rendered(tmp_path: Path):
    results = tmp_path / "results.json"
    found = measured(results, "mixed", "continuous", "modelled", "resident")
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
