"""A whole service process: what it tells when it is ready, and how it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from toile.core.rpc.client import grpc_health_check
from toile.v1 import rank_pb2, rank_pb2_grpc

PROCESS = """
import asyncio, time
from toile.core.rpc.server import Service, run
from toile.v1 import rank_pb2_grpc

class Ranker(rank_pb2_grpc.RankServiceServicer):
    async def GetRanking(self, request, context):
        await asyncio.to_thread(time.sleep, 300)

run(lambda settings: Service(
    "rank",
    [(rank_pb2_grpc.add_RankServiceServicer_to_server, Ranker())],
    ["toile.v1.RankService"],
    {},
))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TOILE_")}
    return plain | {"TOILE_READY_FILE": str(tmp_path / "ready.json")}


@pytest.fixture
def process(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_tells_its_ports_and_stops_when_told(
    process: subprocess.Popen[str], environment: dict[str, str], number: signal.Signals
) -> None:
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready.keys() >= {"event", "service", "port", "metrics_port"}
    assert (ready["event"], ready["service"]) == ("ready", "rank")
    assert grpc_health_check(f"127.0.0.1:{ready['port']}", timeout_seconds=10)
    assert httpx.get(f"http://127.0.0.1:{ready['metrics_port']}/metrics").status_code == 200
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == ""
    assert [json.loads(line)["process"] for line in err.splitlines()]
    assert json.loads(Path(environment["TOILE_READY_FILE"]).read_text()) == ready


def test_a_stuck_thread_does_not_keep_the_process(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        env=environment | {"TOILE_GRACE_SECONDS": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = rank_pb2_grpc.RankServiceStub(channel)
            call = stub.GetRanking.future(rank_pb2.GetRankingRequest(), timeout=60)
            with pytest.raises(grpc.FutureTimeoutError):
                call.exception(timeout=1)
            process.send_signal(signal.SIGTERM)
            assert call.exception() is not None
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "left threads behind" in err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TOILE_PORT", "taken", "port"),
        ("TOILE_S3", "{", "s3"),
        ("TOILE_GRACE_SECONDS", "soon", "grace_seconds"),
    ],
)
def test_a_process_that_cannot_start_says_why(
    environment: dict[str, str], name: str, value: str, said: str
) -> None:
    with contextlib.ExitStack() as stack:
        if value == "taken":
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            value = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-c", PROCESS],
            env=environment | {name: value},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
