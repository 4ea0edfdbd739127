"""Starting, finding and ending the platform's own processes, and nobody else's."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from toile.cli.platform.state import MARK

_KILL_SECONDS = 5.0


async def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> asyncio.subprocess.Process:
    """Start a process at the head of a session of its own, writing to a log."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )


async def stop(process: asyncio.subprocess.Process, grace_seconds: float) -> None:
    """Ask a process to end, then end its whole group."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_seconds):
            await process.wait()
    except TimeoutError:
        kill_group(process.pid)
        await process.wait()
    else:
        kill_group(process.pid)


def kill_group(leader: int) -> None:
    """End what is left of the group that `start` made for a process we have not forgotten."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def marked(platform_id: str) -> list[psutil.Process]:
    """Return the processes that carry a platform's mark in their environment, this one apart."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == platform_id:
                found.append(process)
    return found


def sweep(platform_id: str, *, session: int | None = None, wait_seconds: float = 3.0) -> None:
    """End every process with a platform's mark, after giving those that are leaving time to.

    With `session`, only those in the session that this process began.
    """
    deadline = time.monotonic() + wait_seconds
    while (left := _in_session(marked(platform_id), session)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_KILL_SECONDS)


def _in_session(found: list[psutil.Process], session: int | None) -> list[psutil.Process]:
    if session is None:
        return found
    members = []
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == session:
                members.append(process)
    return members


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Sum up what processes hold, pages that several share counted once (PSS on Linux)."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.uss
    return total


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that came from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []
