"""`toile up`, `status` and `down` with Ray, the models and the five services."""

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families

from integration.platform_home import PATIENCE_SECONDS, Home, nothing_left, part
from toile.cli.platform.processes import marked
from toile.imaging.png import read

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)
ROOT = Path(__file__).parents[2]
EXAMPLES, STAND_IN = ROOT / "examples", ROOT / "tests" / "servers" / "grpcurl.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Home]:
    """A platform that runs for all tests of this file; the last one stops it."""
    home = Home(tmp_path_factory.mktemp("home"), tiny_bundle)
    up = home.toile("up")
    assert up.returncode == 0, up.stderr
    try:
        yield home
    finally:
        home.toile("down")


def test_a_platform_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", bundle=tmp_path / "no-bundle")
    done = home.toile("up")
    assert done.returncode == 1
    assert "there is no base bundle at" in done.stderr
    assert "catalog ended with exit code 1; the platform was stopped" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_left(home.platform_id())
    assert home.toile("status").returncode == 3


def test_everything_is_ready_and_a_second_up_says_that_it_runs(home: Home) -> None:
    status = home.json("status")
    assert status["status"] == "ready"
    assert {p["name"] for p in status["parts"]} == {
        *("catalog", "ray", "models", "dataset", "train", "generate", "rank", "refine"),
        *("triton", "engines"),
    }
    assert status["memory_bytes"] < 8 << 30
    supervisor = status["supervisor_pid"]
    again = home.toile("up")
    assert again.returncode == 0
    assert "The platform is running" in again.stdout
    assert home.json("status")["supervisor_pid"] == supervisor


def test_services_describe_themselves_to_clients_without_protos(home: Home) -> None:
    addresses = home.json("status")["addresses"]
    names = {
        "dataset": ("DatasetService", "JobService"),
        "train": ("TrainService", "JobService"),
        "generate": ("GenerateService",),
        "rank": ("RankService",),
        "refine": ("RefineService",),
    }
    for service, expected in names.items():
        with grpc.insecure_channel(addresses[f"{service}_address"]) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            listed = set(database.get_services())
            assert {f"toile.v1.{name}" for name in expected} <= listed
            assert "grpc.health.v1.Health" in listed
            for name in expected:
                file = database.FindFileContainingSymbol(f"toile.v1.{name}")
                assert isinstance(file, descriptor_pb2.FileDescriptorProto)
                assert any(s.name == name and s.method for s in file.service)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with three of the lace photographs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in sorted((EXAMPLES / "lace" / "photos").glob("*.jpg"))[:3]:
        shutil.copy(path, folder)
    return folder


def test_the_whole_loop_by_the_python_client(home: Home, photographs: Path) -> None:
    path = EXAMPLES / "clients" / "python_client.py"
    spec = importlib.util.spec_from_file_location("python_client", path)
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    addresses = home.json("status")["addresses"]
    del addresses["ray_jobs_url"]
    metadata = read(client.run(photographs, addresses, steps=2, count=2))
    assert metadata.toile is not None


@pytest.mark.slow
def test_the_whole_loop_by_grpcurl(home: Home, photographs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(EXAMPLES / "clients" / "grpcurl.sh"), str(photographs)],
        env={**home.environment, "GRPCURL": grpcurl(tmp_path), "STEPS": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "toile.v1.DatasetService" in done.stdout
    assert done.stdout.count("JOB_STATE_SUCCEEDED") >= 2
    metadata = read((tmp_path / "refined.png").read_bytes())
    assert metadata.parameters is not None
    assert metadata.parameters.seed == 7


def grpcurl(folder: Path) -> str:
    """The program, or what stands in for it where it is not installed."""
    found = shutil.which("grpcurl")
    if found is not None:
        return found
    path = folder / "grpcurl"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_service_that_is_killed_comes_back(home: Home) -> None:
    before = part(home.json("status"), "rank")
    psutil.Process(before["pid"]).kill()
    status = home.wait(lambda s: s["status"] == "ready" and part(s, "rank")["restarts"] == 1)
    after = part(status, "rank")
    assert after["pid"] != before["pid"]
    assert after["address"] == before["address"]


@pytest.mark.slow
def test_traffic_outlives_the_engine_and_the_models(home: Home) -> None:
    """Four clients draw while Triton is killed, then the replica: none notices but by waiting."""
    home.wait(lambda s: part(s, "engines")["status"] == "ready")
    drawn_before = engine_calls(home)

    def client(seed: int) -> dict[str, Any]:
        return home.json(
            *("generate", "a red dress", "-n", 12, "--steps", 40, "--seed", seed),
            *("--out", home.folder / f"chaos{seed}"),
        )

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, seed) for seed in (100, 200, 300, 400)]
        wait_for(lambda: engine_calls(home) > drawn_before + 20)
        psutil.Process(part(home.status(), "triton")["pid"]).kill()
        home.wait(lambda s: part(s, "engines")["restarts"] == 1)
        wait_for(lambda: engine_calls(home) > 20)  # counted anew
        (replica,) = (
            process
            for process in marked(home.platform_id())
            if "ServeReplica" in " ".join(process.cmdline())
        )
        replica.kill()
        answers = [answer.result() for answer in clients]
    for answer, first in zip(answers, (100, 200, 300, 400), strict=True):
        assert answer["state"] == "GENERATION_STATE_SUCCEEDED"
        assert [int(image["seed"]) for image in answer["images"]] == list(range(first, first + 12))
        assert len({image["digest"] for image in answer["images"]}) == 12


def engine_calls(home: Home) -> float:
    """Return how often the engine was called since Triton was started."""
    address = part(home.status(), "triton")["metrics_address"]
    try:
        text = httpx.get(f"http://{address}/metrics").text
    except httpx.HTTPError:
        return 0.0
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "toile_engine_calls_total"
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_a_ray_head_that_is_killed_comes_back_with_the_models(home: Home) -> None:
    before = home.json("status")
    head = psutil.Process(part(before, "ray")["pid"])
    head.kill()
    status = home.wait(lambda s: s["status"] == "ready" and part(s, "ray")["restarts"] >= 1)
    assert part(status, "models")["restarts"] >= 1
    assert part(status, "generate")["pid"] == part(before, "generate")["pid"]
    made = home.json("generate", "a red dress", "--steps", 1, "--out", home.folder / "designs")
    assert Path(made["files"][0]).stat().st_size > 0


def test_after_down_nothing_of_it_is_left(home: Home) -> None:
    mark, scratch = home.platform_id(), home.json("status")["ray_address"]
    assert scratch
    assert not nothing_left(mark)
    assert home.json("down") == {"stopped": True}
    assert nothing_left(mark)
    assert not (home.folder / "run" / "platform.json").exists()
    late = home.toile("dataset", "list")
    assert late.returncode == 3
    assert "toile up" in late.stderr
