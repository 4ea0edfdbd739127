"""A keeper brings one part up and brings it back when it ends."""

import asyncio
import time

import structlog
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_never,
    wait_exponential,
)

from toile.cli.platform import processes
from toile.cli.platform.board import Board
from toile.cli.platform.parts import Part
from toile.cli.platform.plan import empty_folder
from toile.cli.platform.state import PartStatus, Paths, ProcessId

_FIRST_START_SECONDS = 600.0
_POLL_SECONDS = 0.5
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0

log = structlog.get_logger()


class PartDiedError(Exception):
    """A part ended, or was not ready in time."""


class Keeper:
    """Looks after one part. Its first start is tried a few times, later ones for ever."""

    def __init__(self, part: Part, board: Board, paths: Paths) -> None:
        self.part = part
        self._board = board
        self._log = paths.log(part.name)
        self._process: asyncio.subprocess.Process | None = None
        self._epoch = 0
        self._started_before = False

    async def keep(self) -> None:
        """Run until cancelled.

        Raises:
            PartDiedError: The very first start failed.
        """
        while True:
            try:
                await self._bring_up()
            except PartDiedError as error:
                if not self.part.background:
                    raise
                self._give_up(error)
                await self._until_followed()
                continue
            self._started_before = True
            message = await self._until_gone()
            restarts = self._board.part(self.part.name).restarts + 1
            log.warning("part_restarts", part=self.part.name, why=message, restarts=restarts)
            self._board.update_part(
                self.part.name, status=PartStatus.RESTARTING, restarts=restarts, message=message
            )
            await asyncio.sleep(_PAUSE_SECONDS)

    async def stop(self) -> None:
        """End the part's process."""
        process = self._process
        if process is not None and process.returncode is None:
            began = time.monotonic()
            if self.part.before_end is not None:
                await self.part.before_end()
            await processes.stop(process, self.part.grace_seconds)
            seconds = round(time.monotonic() - began, 2)
            log.info("part_stopped", part=self.part.name, seconds=seconds)
        if process is not None:
            await self._clear(process)
        if self._board.part(self.part.name).status is not PartStatus.FAILED:
            self._board.update_part(self.part.name, status=PartStatus.STOPPED, process=None)

    async def _bring_up(self) -> None:
        first = self.part.first_attempts
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(PartDiedError),
            stop=stop_never if self._started_before else stop_after_attempt(first),
            wait=wait_exponential(multiplier=_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
            before_sleep=self._note_failed_start,
            reraise=True,
        ):
            with attempt:
                await self._start()

    def _give_up(self, error: PartDiedError) -> None:
        log.error("part_given_up", part=self.part.name, why=str(error))
        self._board.update_part(
            self.part.name, status=PartStatus.FAILED, process=None, message=str(error)
        )

    def _note_failed_start(self, retry: RetryCallState) -> None:
        error = retry.outcome.exception() if retry.outcome else None
        pause = retry.upcoming_sleep
        log.warning("part_start_failed", part=self.part.name, why=str(error), pause_seconds=pause)
        self._board.update_part(
            self.part.name, status=PartStatus.RESTARTING, process=None, message=str(error)
        )

    async def _start(self) -> None:
        part, board = self.part, self._board
        await board.until(lambda: board.ready(part.needs))
        self._epoch = board.epoch(part.again_with) if part.again_with else 0
        if self._process is not None:
            await self._clear(self._process)
        if part.scratch is not None:
            await asyncio.to_thread(empty_folder, part.scratch)
        began = time.monotonic()
        process = await processes.start(part.command, part.environment, self._log)
        self._process = process
        board.update_part(
            part.name, status=PartStatus.STARTING, process=ProcessId.of(process.pid), message=""
        )
        await self._until_ready(process)
        seconds = round(time.monotonic() - began, 2)
        log.info("part_ready", part=part.name, pid=process.pid, seconds=seconds)
        board.update_part(
            part.name,
            status=PartStatus.READY,
            ready_seconds=seconds,
            **({"process": None} if part.ready is None else {}),
        )

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        part = self.part
        # A service that waits for what it depends on is not killed for that later on, and a task
        # that nothing waits for takes what it takes: to compile an engine is much work.
        patient = self._started_before if part.ready is not None else part.background
        try:
            async with asyncio.timeout(None if patient else _FIRST_START_SECONDS):
                if part.ready is None:
                    if await process.wait():
                        raise PartDiedError(_how_it_ended(process))
                    return
                gone = asyncio.ensure_future(process.wait())
                try:
                    while not gone.done():
                        if await part.ready():
                            return
                        await asyncio.wait({gone}, timeout=_POLL_SECONDS)
                finally:
                    gone.cancel()
                raise PartDiedError(_how_it_ended(process))
        except TimeoutError:
            await processes.stop(process, part.grace_seconds)
            raise PartDiedError(f"was not ready within {_FIRST_START_SECONDS:.0f} s") from None

    async def _until_gone(self) -> str:
        """Wait until the part must be started again; return why."""
        part = self.part
        if part.ready is not None and self._process is not None:
            await self._process.wait()
            return _how_it_ended(self._process)
        await self._until_followed()
        return f"{part.again_with} was restarted"

    async def _until_followed(self) -> None:
        """Wait until the part that this one follows was restarted; for ever if it follows none."""
        part, board = self.part, self._board
        if not part.again_with:
            await asyncio.Event().wait()
        await board.until(
            lambda: (
                board.epoch(part.again_with) != self._epoch or not board.ready([part.again_with])
            )
        )

    async def _clear(self, process: asyncio.subprocess.Process) -> None:
        """End what a process left behind in its session."""
        processes.kill_group(process.pid)
        await asyncio.to_thread(processes.sweep, self._board.state.id, session=process.pid)


def _how_it_ended(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    if code is not None and code < 0:
        return f"was ended by signal {-code}"
    return f"ended with exit code {code}"
