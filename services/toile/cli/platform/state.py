"""What a running platform says about itself, in `TOILE_HOME/run/platform.json`."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from toile.core.settings import Settings

# Every process of a platform carries this variable, whoever started it: by it they are
# found again when the supervisor that knew them is gone.
MARK = "TOILE_PLATFORM_ID"


class PartStatus(StrEnum):
    """Where a part is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProcessId(_Record):
    """A process, told apart from a later one that was given the same number."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> "ProcessId | None":
        """Return the identity of a process that exists."""
        try:
            return cls(pid=pid, created=psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    def process(self) -> psutil.Process | None:
        """Return the process if it is still this one and not a zombie."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.1
            if not same or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process


class PartState(_Record):
    """One part. `ready_seconds` is how long it took from its start until it was ready."""

    name: str
    status: PartStatus = PartStatus.WAITING
    process: ProcessId | None = None
    address: str = ""
    metrics_address: str = ""
    log: str = ""
    restarts: int = 0
    ready_seconds: float | None = None
    message: str = ""
    background: bool = False


class PlatformState(_Record):
    """The whole platform. `ready_seconds` counts from the supervisor's start."""

    id: str
    supervisor: ProcessId
    status: PartStatus
    parts: tuple[PartState, ...]
    addresses: dict[str, str]  # settings that clients need, by field name
    ray_address: str = ""
    scratch: str = ""  # Ray's folder, removed at the end
    ready_seconds: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Paths:
    """Where a platform keeps its own files."""

    home: Path

    @classmethod
    def of(cls, settings: Settings) -> "Paths":
        """Paths under `TOILE_HOME`."""
        return cls(settings.home_path)

    @property
    def state(self) -> Path:
        """The state file."""
        return self.home / "run" / "platform.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor for as long as it lives."""
        return self.home / "run" / "platform.lock"

    @property
    def logs(self) -> Path:
        """One log for each part."""
        return self.home / "logs"

    def log(self, part: str) -> Path:
        """The log of a part."""
        return self.logs / f"{part}.log"


def write_state(path: Path, state: PlatformState) -> None:
    """Replace the state file; a reader sees the old one or the new one, whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".platform-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(state.model_dump_json(indent=1))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_state(path: Path) -> PlatformState | None:
    """Return the state, or None when there is no readable one."""
    try:
        return PlatformState.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def running_state(settings: Settings) -> PlatformState | None:
    """Return the state of a platform whose supervisor is alive."""
    state = read_state(Paths.of(settings).state)
    if state is None or state.supervisor.process() is None:
        return None
    return state


@contextlib.contextmanager
def supervisor_lock(path: Path) -> Iterator[bool]:
    """Take the lock for a block; false when another supervisor has it.

    The system gives it back when the process dies, however it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
