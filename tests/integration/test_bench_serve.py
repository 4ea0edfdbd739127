"""The benchmark of drawing through Triton runs; what it measures is nobody's promise here."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_the_smallest_run_measures_what_is_rendered(tmp_path: Path):
    if not (ROOT / ".venv-triton").is_dir():
        pytest.skip("there is no .venv-triton; `make triton` makes it")
    results = tmp_path / "results.json"
    python("-m", "serve", "--figure", "4", "--scale", "smallest", "--out", str(results))
    resident = json.loads(results.read_text(encoding="utf-8"))["resident"]
    assert set(resident["first_step"]) == {"8", "16", "64"}
    memory = resident["memory"]
    assert memory["loads"] == memory["switches"], "an adapter was not new, or not loaded"
    assert memory["evictions"] == memory["loads"] - memory["held"]
    code = "import json, sys, serve.render as r; print(r.render(json.load(open(sys.argv[1]))))"
    rendered = python("-c", code, str(results))
    assert rendered.count("| 64 |") == 1
    assert f"{memory['evictions']:.0f} evictions" in rendered
