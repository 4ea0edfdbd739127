"""What a job's processes printed, as compute keeps it.

Ray has the log of each attempt for as long as its head lives and the machine that ran it is there;
Kubernetes for as long as there is the RayJob.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from toile.core.errors import ComputeUnavailableError
from toile.core.jobs.launcher import JobLauncher
from toile.core.jobs.records import JobStore
from toile.core.jobs.states import FINAL_STATES, JobState
from toile.core.jobs.supervisor import submission_id

# Ray's tail of a log is a WebSocket, which would be a library more for a log that grows by lines.
FOLLOW_INTERVAL_SECONDS = 1.0
# A job's last state is written by its process, which prints a little more before it leaves.
LEAVE_SECONDS = 10.0
CHUNK_CHARACTERS = 1 << 16


class LogChunk(NamedTuple):
    """A piece of what an attempt printed."""

    attempt: int
    text: str


class JobLogs:
    """Reads the logs of jobs."""

    def __init__(self, jobs: JobStore, launcher: JobLauncher) -> None:
        self._jobs = jobs
        self._launcher = launcher

    async def read(self, name: str, *, follow: bool, tail_lines: int) -> AsyncIterator[LogChunk]:
        """Yield what was printed, the oldest attempt first; nothing where nothing is kept.

        Args:
            name: The job.
            follow: Go on until the job has ended, over pauses and lost compute.
            tail_lines: Begin with so many of the last lines; 0 for all.

        Raises:
            NotFoundError: There is no such job.
            ComputeUnavailableError: Compute does not answer; while following it is waited for.
        """
        row = await asyncio.to_thread(self._jobs.get, name)
        texts = [
            LogChunk(attempt, await self._text(name, attempt))
            for attempt in range(1, row.attempt + 1)
        ]
        for attempt, text in tail(texts, tail_lines) if tail_lines else texts:
            for piece in _pieces(text):
                yield LogChunk(attempt, piece)
        if follow:
            seen = len(texts[-1].text) if texts else 0
            async for chunk in self._follow(name, max(row.attempt, 1), seen):
                yield chunk

    async def _follow(self, name: str, attempt: int, seen: int) -> AsyncIterator[LogChunk]:
        """Yield what an attempt prints after `seen` characters, and all attempts after it."""
        while True:
            row = await asyncio.to_thread(self._jobs.get, name)
            ended = JobState(row.state) in FINAL_STATES
            try:
                if ended:
                    await self._left(name, attempt)
                text = await self._text(name, attempt)
            except ComputeUnavailableError:
                text = ""
            for piece in _pieces(text[seen:]):
                yield LogChunk(attempt, piece)
            seen = max(seen, len(text))
            if row.attempt > attempt:
                attempt, seen = attempt + 1, 0
            elif ended:
                return
            else:
                await asyncio.sleep(FOLLOW_INTERVAL_SECONDS)

    async def _text(self, name: str, attempt: int) -> str:
        return await asyncio.to_thread(self._launcher.logs, submission_id(name, attempt)) or ""

    async def _left(self, name: str, attempt: int) -> None:
        """Wait, not for ever, until the process of an attempt has gone."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            known = await asyncio.to_thread(self._launcher.get, submission_id(name, attempt))
            if known is None or known.ended:
                return
            await asyncio.sleep(FOLLOW_INTERVAL_SECONDS)


def tail(texts: list[LogChunk], lines: int) -> list[LogChunk]:
    """The last lines of texts that follow one another; at least one line."""
    kept: list[LogChunk] = []
    for attempt, text in reversed(texts):
        found = text.splitlines(keepends=True)[-lines:]
        kept.insert(0, LogChunk(attempt, "".join(found)))
        lines -= len(found)
        if not lines:
            break
    return kept


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), CHUNK_CHARACTERS):
        yield text[start : start + CHUNK_CHARACTERS]
