"""A real Triton on this machine, from the `nvidia-pytriton` wheel in an environment of its own.

The wheel holds the server and its Python backend. Its Python needs `numpy<2` (with a newer one
outputs come back empty), so it cannot share the services' environment; `make triton` makes it.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from toile.core.errors import ComputeUnavailableError, FailedPreconditionError
from toile.diffusion.triton.client import are_ready

READY_SECONDS = 60.0
STOP_SECONDS = 15.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend has its regions

_PROBE = (
    "import json,sys,sysconfig;"
    "print(json.dumps([sysconfig.get_config_var('Py_ENABLE_SHARED'),sysconfig.get_config_var('LIBDIR'),"
    "sysconfig.get_path('purelib'),'%d.%d'%sys.version_info[:2]]))"
)


@dataclass(frozen=True)
class TritonEnvironment:
    """An environment that holds the server; made once, then read only."""

    folder: Path
    """Of the virtual environment."""
    site_packages: Path
    library_folder: Path
    """Of the interpreter's own libpython: the only one the server may see."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Look at an environment, and put the backend's parts where the server looks for them.

        Raises:
            FailedPreconditionError: It is not there or lacks the server (`NO_TRITON`), or its
                Python was built without a shared library (`NO_LIBPYTHON`).
        """
        python = folder / "bin" / "python"
        if not python.is_file():
            raise _missing(f"there is no environment at {folder}")
        probe = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=30
        )
        if probe.returncode:
            raise _missing(f"{python} does not run: {probe.stderr.strip()[-200:]}")
        shared, library_folder, site_packages, version = json.loads(probe.stdout)
        if not shared:
            raise FailedPreconditionError(
                f"the Python of {folder} has no shared libpython, which Triton's Python backend "
                "needs; make the environment with another: make triton PYTHON=python3.11",
                reason="NO_LIBPYTHON",
            )
        environment = cls(folder, Path(site_packages), Path(library_folder))
        if not environment.server.is_file():
            raise _missing(f"{folder} does not hold nvidia-pytriton")
        environment.server.chmod(0o755)
        stub = environment.root / "python_backend_stubs" / version / "triton_python_backend_stub"
        placed = environment.backends / "python" / stub.name
        if not stub.is_file():
            raise _missing(f"nvidia-pytriton has no Python backend for Python {version}")
        if not placed.is_file():
            partial = placed.with_suffix(f".{os.getpid()}")
            shutil.copyfile(stub, partial)
            partial.chmod(0o755)
            partial.replace(placed)
        return environment

    @property
    def root(self) -> Path:
        """Folder of the server and its backends."""
        return self.site_packages / "pytriton" / "tritonserver"

    @property
    def server(self) -> Path:
        """The server."""
        return self.root / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        """The backends."""
        return self.root / "backends"

    def variables(self) -> dict[str, str]:
        """Return the environment variables that the server runs with."""
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "VIRTUAL_ENV": str(self.folder),
            "PYTHONPATH": str(self.site_packages),
            # Another libpython beside it gives empty outputs.
            "LD_LIBRARY_PATH": str(self.library_folder),
        }


@dataclass(frozen=True)
class TritonPorts:
    """Where a server listens."""

    http: int
    metrics: int


def server_command(
    environment: TritonEnvironment,
    repository: Path,
    ports: TritonPorts,
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    shared_memory: str = "",
    drain_seconds: int = 10,
) -> list[str]:
    """Return the command that serves a repository.

    Args:
        environment: What holds the server.
        repository: The model repository.
        ports: Where it listens.
        models: To load at once; others are loaded by name while it runs.
        host: Address to listen on.
        shared_memory: How the names of its regions of shared memory begin; a server that is
            killed leaves them behind.
        drain_seconds: What it may take to finish when it is told to end.

    Raises:
        FailedPreconditionError: A folder's name needs a link that cannot be made (`NO_LINK`).
    """
    prefix = (f"--backend-config=python,shm-region-prefix-name={shared_memory}",)
    return [
        str(environment.server),
        f"--model-repository={plainly_named(repository)}",
        f"--backend-directory={plainly_named(environment.backends)}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        *(prefix if shared_memory else ()),
        "--allow-grpc=false",
        f"--http-address={host}",
        f"--http-port={ports.http}",
        f"--metrics-address={host}",
        f"--metrics-port={ports.metrics}",
        f"--exit-timeout-secs={drain_seconds}",
        "--disable-auto-complete-config",
    ]


@dataclass
class TritonServer:
    """A server as a child of this process."""

    environment: TritonEnvironment
    repository: Path
    ports: TritonPorts
    models: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """host:port of its HTTP."""
        return f"127.0.0.1:{self.ports.http}"

    def start(self, timeout_seconds: float = READY_SECONDS) -> None:
        """Start it, and return when all its models are ready.

        Raises:
            ComputeUnavailableError: It ended, or was not ready in time; the message names its log.
        """
        command = server_command(
            self.environment,
            self.repository,
            self.ports,
            self.models,
            shared_memory=self._shared_memory,
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self.environment.variables(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise ComputeUnavailableError(
                    f"Triton ended with exit code {code}; its log: {self.log}"
                )
            if are_ready(self.address, self.models):
                return
            time.sleep(0.1)
        self.stop()
        raise ComputeUnavailableError(
            f"Triton was not ready in {timeout_seconds:.0f} s; its log: {self.log}"
        )

    def kill(self) -> None:
        """End it at once, as a crash would, and what a crash would leave behind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the backend's processes
            self.process = None
            remove_shared_memory(self._shared_memory)

    @property
    def _shared_memory(self) -> str:
        return f"toile-triton-{self.ports.http}-"

    def stop(self) -> None:
        """Let it finish what it works on, then end it."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None


def plainly_named(folder: Path) -> Path:
    """Return a path to a folder that a shell takes for one word: itself, or a link to it.

    Triton's Python backend puts paths into a command line unquoted, and a model whose path has a
    space in it never gets ready.

    Raises:
        FailedPreconditionError: The link cannot be made (`NO_LINK`).
    """
    folder = folder.resolve()
    if shlex.quote(str(folder)) == str(folder):
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    link = Path(tempfile.gettempdir()) / f"toile-{os.getuid()}-{name}"
    try:
        if not (link.is_symlink() and link.lstat().st_uid == os.getuid() and link.samefile(folder)):
            link.unlink(missing_ok=True)
            link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        raise FailedPreconditionError(
            f"Triton cannot read {folder}, whose name has spaces or the like in it, and a link to "
            f"it cannot be made: {error}",
            reason="NO_LINK",
        ) from error
    return link


def remove_shared_memory(prefix: str) -> None:
    """Remove the regions whose names begin so; a server that was killed leaves them behind."""
    for path in _SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def _missing(problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"{problem}; `make triton` makes one", reason="NO_TRITON")
