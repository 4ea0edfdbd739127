"""The platform as its user sees it: up, down, and how much it holds."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from toile.cli.errors import PlatformFailedError
from toile.cli.platform import processes
from toile.cli.platform.state import (
    PartState,
    PartStatus,
    Paths,
    PlatformState,
    read_state,
    running_state,
    supervisor_lock,
)
from toile.core.errors import DeadlineError
from toile.core.settings import Settings

_POLL_SECONDS = 0.25
_APPEARS_SECONDS = 30.0
_STOP_SECONDS = 120.0
_TAIL_LINES = 15
_ALREADY_RUNNING = 75

OnChange = Callable[[PlatformState], None]


@dataclass(frozen=True)
class Started:
    """What `up` found or made. `ours` is false when the platform was there before."""

    state: PlatformState
    ours: bool


def up(settings: Settings, on_change: OnChange = lambda _: None) -> Started:
    """Start the platform, or find it running; return when it is ready.

    Interrupted while it starts what is its own, it stops that again.

    Raises:
        PlatformFailedError: A part could not be started.
    """
    state = running_state(settings)
    if state is not None and state.status is not PartStatus.STOPPING:
        return Started(_follow(settings, None, on_change), ours=False)
    if state is not None:
        down(settings)
    supervisor = _spawn(settings)
    try:
        return Started(_follow(settings, supervisor, on_change), ours=True)
    except _OtherSupervisorError:
        return Started(_follow(settings, None, on_change), ours=False)
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(_STOP_SECONDS)
        raise


def down(settings: Settings) -> bool:
    """Stop the platform; false when there was none. Nothing of it is left behind.

    Raises:
        DeadlineError: The supervisor did not end.
    """
    paths = Paths.of(settings)
    state = read_state(paths.state)
    if state is None:
        return False
    supervisor = state.supervisor.process()
    if supervisor is not None:
        supervisor.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([supervisor], timeout=_STOP_SECONDS)
        if alive:
            raise DeadlineError(
                f"the supervisor (pid {supervisor.pid}) did not end within {_STOP_SECONDS:.0f} s"
            )
    with supervisor_lock(paths.lock) as free:
        if free:
            from toile.cli.platform.supervisor import remove_remains

            remove_remains(paths)
    return supervisor is not None


def wait_until_gone(state: PlatformState) -> None:
    """Block for as long as the supervisor lives."""
    supervisor = state.supervisor.process()
    while supervisor is not None and supervisor.is_running():
        psutil.wait_procs([supervisor], timeout=1.0)
        supervisor = state.supervisor.process()


def memory_by_part(state: PlatformState) -> dict[str, int]:
    """Return the bytes that each part holds with all its processes, and the supervisor."""
    # Ray's workers are children of the head; services of nobody else.
    held = {
        part.name: processes.memory_bytes(processes.family(process))
        for part in state.parts
        if part.process is not None and (process := part.process.process()) is not None
    }
    supervisor = state.supervisor.process()
    if supervisor is not None:
        held["supervisor"] = processes.memory_bytes([supervisor])
    return held


def log_tail(part: PartState) -> str:
    """Return the last lines of a part's log."""
    try:
        lines = Path(part.log).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])


class _OtherSupervisorError(Exception):
    """Another supervisor was quicker."""


def _spawn(settings: Settings) -> subprocess.Popen[bytes]:
    paths = Paths.of(settings)
    paths.logs.mkdir(parents=True, exist_ok=True)
    log = paths.log("platform")
    if log.exists():
        log.replace(Path(f"{log}.1"))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "toile.cli.platform"],
            env={**os.environ, **settings.environment(), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _follow(
    settings: Settings, supervisor: subprocess.Popen[bytes] | None, on_change: OnChange
) -> PlatformState:
    """Report the state until it is ready.

    Raises:
        PlatformFailedError: It failed, or there is none.
    """
    path = Paths.of(settings).state
    deadline = time.monotonic() + _APPEARS_SECONDS
    last: PlatformState | None = None
    while True:
        ended = supervisor.poll() if supervisor is not None else None
        state = read_state(path)
        if state is not None and supervisor is not None and state.supervisor.pid != supervisor.pid:
            state = None
        if state is not None and state != last:
            on_change(state)
            last = state
        if state is not None and state.status is PartStatus.READY:
            return state
        if ended == _ALREADY_RUNNING:
            raise _OtherSupervisorError
        gone = ended is not None or (
            supervisor is None and (state is None or state.supervisor.process() is None)
        )
        if gone or (state is None and time.monotonic() > deadline):
            raise _failure(settings, state)
        time.sleep(_POLL_SECONDS)


def _failure(settings: Settings, state: PlatformState | None) -> PlatformFailedError:
    if state is not None:
        for part in state.parts:
            if part.status is PartStatus.FAILED:
                return PlatformFailedError(
                    f"{part.name} {part.message}; the platform was stopped. Its log: {part.log}",
                    tail=log_tail(part),
                )
    log = Paths.of(settings).log("platform")
    part = PartState(name="supervisor", log=str(log))
    return PlatformFailedError(f"the platform did not start. Its log: {log}", tail=log_tail(part))
