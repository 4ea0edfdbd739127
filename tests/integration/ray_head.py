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
STARTED = "Ray runtime started"  # what `ray start` says last


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
        """Start the head and wait until it takes jobs.

        Ray gives its own processes 30 seconds, which a busy machine exceeds: then again.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._spawn()
            if self._came_up(deadline):
                return
            self.kill()
        log = (self.folder / "head.log").read_text(errors="replace")
        raise RuntimeError(f"Ray did not start:\n{log[-3000:]}")

    def _spawn(self) -> None:
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
        environment["RAY_AUTH_MODE"] = "disabled"  # whatever token lies in the home folder
        environment["RAY_worker_niceness"] = "0"  # 15 by default: a busy machine starves them
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        with (self.folder / "head.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def processes(self, text: str) -> list[psutil.Process]:
        """Processes of the head whose command line has the text."""
        assert self.process is not None
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if text in command and not command.startswith("/bin/sh"):
                found.append(process)
        return found

    def kill(self) -> None:
        """Kill every process of the head at once, as a power cut would."""
        if self.process is None:
            return
        # By group too: what the head started stays in its group even when the head is gone.
        family = [p for p in psutil.process_iter() if _group(p) == self.process.pid]
        family += [child for process in family for child in _descendants(process)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
        self.process = None

    def terminate(self) -> None:
        """Tell the head to end, and wait until it has ended all that it started."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(60)
        self.kill()

    def stop(self) -> None:
        """End the head and remove its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _came_up(self, deadline: float) -> bool:
        assert self.process is not None
        while time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.2)
            # The dashboard answers before the node is there, and even if it never comes.
            if STARTED not in (self.folder / "head.log").read_text(errors="replace"):
                continue
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.jobs_url}/api/version", trust_env=False).is_success:
                    return True
        return False


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return 0


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # for drivers in this process, as for the head
        try:
            head.start()
            yield head
        finally:
            head.stop()
