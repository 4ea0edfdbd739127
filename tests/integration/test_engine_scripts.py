"""The scripts of `tensorrt/` export, build and verify from the command line, without a GPU."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toile.core.bases import bundle_digest
from toile.core.errors import FailedPreconditionError
from toile.diffusion.engines import Fingerprint
from toile.diffusion.shipped import shipped_bundle_path

pytest.importorskip("onnxruntime", reason="the engine extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
PART = ["--part", "text_encoder_2"]


def script(path: str, *arguments: object, status: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / path, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if done.stdout else {"said": done.stderr}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "text.onnx"
    found = script("tensorrt/export_unet.py", *PART, "--out", path)
    assert found == {"onnx": str(path), "bytes": path.stat().st_size}
    return path


def test_an_onnx_file_is_compared_with_torch(onnx: Path) -> None:
    found = script("tensorrt/verify_engine.py", onnx, *PART, "--batch", "1", "3", "--runs", "2")
    assert found["passed"] is True
    assert [one["sizes"]["batch"] for one in found["checks"]] == [1, 3]
    for one in found["checks"]:
        assert one["parity"].keys() == {"hidden_states", "text_embeds"}
        assert all(60 < parity["psnr_db"] < 120 for parity in one["parity"].values())
        assert 0 < one["milliseconds"]["least"] <= one["milliseconds"]["median"]
        assert one["torch_milliseconds"]["median"] > 0


def test_an_onnx_file_of_another_network_does_not_pass(onnx: Path, tiny_bundle: Path) -> None:
    arguments = [onnx, *PART, "--batch", "2", "--runs", "1", "--base", tiny_bundle]
    found = script("tensorrt/verify_engine.py", *arguments, status=1)
    assert found["passed"] is False
    assert min(p["psnr_db"] for p in found["checks"][0]["parity"].values()) < 30


def test_an_engine_is_checked_as_far_as_it_goes_without_a_gpu(
    onnx: Path, tiny_bundle: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and tests/gpu does it")
    pytest.importorskip("tensorrt_rtx_bindings", reason="the rtx extra is not installed")
    build = ["--onnx", onnx, "--compute-capability", "8.9"]
    refused = script("tensorrt/build_engine.py", *build, "--vram-limit", "0.001", status=1)
    assert "more GPU memory than the limit" in refused["said"]
    engine = Path(script("tensorrt/build_engine.py", *build)["engine"])
    found = script("tensorrt/verify_engine.py", engine, *PART)
    assert found["passed"] is True
    assert found["not_done"] == ["parity", "speed", "compute capability"]
    assert found["fingerprint"]["base_digest"] == bundle_digest(shipped_bundle_path())
    rebuilt_for_another_gpu(engine, list(found["fingerprint"]["profiles"][0]))
    other = script("tensorrt/verify_engine.py", engine, "--base", tiny_bundle, status=1)
    assert other["problems"] == ["it was built from another base"]
    onnx_bytes = onnx.read_bytes()
    onnx.write_bytes(onnx_bytes + b"\0")
    found = script("tensorrt/verify_engine.py", engine, status=1)
    assert found["problems"] == [f"it was not built from {onnx.name}"]
    engine.write_bytes(engine.read_bytes()[:-1])
    assert script("tensorrt/verify_engine.py", engine, status=1)["reason"] == "ENGINE_BROKEN"


def rebuilt_for_another_gpu(engine: Path, ranges: list[str]) -> None:
    """Do what the error says."""
    before = Fingerprint.load(engine)
    with pytest.raises(FailedPreconditionError) as caught:
        before.check(
            builder=before.builder,
            builder_version=before.builder_version,
            compute_capability="8.6",
        )
    _, program, *arguments = shlex.split(caught.value.metadata["command"])
    assert all("--" + name.replace("_", "-") in arguments for name in ranges)
    assert script(program, *arguments)["engine"] == str(engine)
    assert Fingerprint.load(engine) == replace(before, compute_capabilities=("8.6",))


def test_the_full_size_program_runs_in_miniature(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the rtx extra is not installed")
    out = tmp_path / "results.json"
    arguments = [sys.executable, "-P", ROOT / "benchmarks/engine_full/__main__.py", "--miniature"]
    subprocess.run([*arguments, "--out", out], check=True)
    results = json.loads(out.read_text())
    assert results["miniature"] is True
    export, build = results["stages"]
    assert export["onnx_bytes"] > 2 * export["parameters"]
    assert build["engine_bytes"] > export["onnx_bytes"] / 2
    assert export["peak_memory_bytes"] > 1 << 27
    # A floor above all memory ends the first stage at once.
    done = subprocess.run(
        [*arguments, "--out", out, "--least-available-bytes", str(1 << 50)], capture_output=True
    )
    assert done.returncode == 1
    assert "too little memory" in json.loads(out.read_text())["stages"][0]["ended"]


def test_the_gpu_benchmark_runs_in_miniature(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-P", ROOT / "benchmarks/gpu/__main__.py"]
    options = "--miniature --batch 1 --pixels 64 --rank 4 --runs 2 --backend aot_eager --out"
    subprocess.run([*command, *options.split(), out], check=True)
    results = json.loads(out.read_text())
    assert results["miniature"] is True
    rows = {row["variant"]: row for row in results["rows"]}
    assert set(rows) == {
        "eager",
        "banked rank 4",
        "compiled",
        "compiled banked rank 4",
    }
    assert all(0 < row["share_of_matmul_rate"] < 1 for row in rows.values())
    assert ["bank_cost_percent" in row for row in rows.values()] == [False, True, False, True]
