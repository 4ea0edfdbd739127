"""A real Ray head on this machine, for tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

START_SECONDS = 240.0
LOGICAL_CPUS = 16


@dataclass
class RayHead:
    """A head in a process group of its own; its ports stay the same when it is started again."""

    # Ray's sockets must have short paths.
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")))
    ports: list[int] = field(default_factory=lambda: _free_ports(5))
    process: subprocess.Popen[bytes] | None = None

    @property
    def jobs_url(self) -> str:
        """URL of the Jobs API."""
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def address(self) -> str:
        """What `ray.init(address=…)` takes."""
        return f"127.0.0.1:{self.ports[0]}"

    def start(self) -> None:
        """Start the head and wait until it takes jobs."""
        gcs, dashboard, agent, agent_grpc, env_agent = (str(port) for port in self.ports)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--disable-usage-stats", "--num-cpus", str(LOGICAL_CPUS)),
            *("--object-store-memory", str(150_000_000), "--temp-dir", str(self.folder)),
            *("--node-ip-address", "127.0.0.1", "--port", gcs),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
            *("--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", agent_grpc),
            *("--runtime-env-agent-port", env_agent, "--include-log-monitor", "false"),
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TOILE_"))}
        environment["RAY_USAGE_STATS_ENABLED"] = "0"
        environment["RAY_worker_niceness"] = "0"  # 15 by default: a busy machine starves them
        with (self.folder / "head.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._wait()

    def kill(self) -> None:
        """Kill every process of the head at once, as a power cut would."""
        if self.process is None:
            return
        family = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        family += [child for process in family for child in process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
        self.process = None

    def stop(self) -> None:
        """End the head and remove its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.jobs_url}/api/version", trust_env=False).is_success:
                    return
            time.sleep(0.2)
        log = (self.folder / "head.log").read_text(errors="replace")
        self.kill()
        raise RuntimeError(f"Ray did not start:\n{log[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The session's Ray head: `jobs_url` and `address`."""
    pytest.importorskip("ray", reason="the compute extra is not installed")
    head = RayHead()
    try:
        head.start()
        yield head
    finally:
        head.stop()
