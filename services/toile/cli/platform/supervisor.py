"""The process that owns the platform: `python -m toile.cli.platform`.

It starts the parts in the order of their needs, brings back what ends, and stops everything
when it is told to by SIGTERM. It alone writes the state file.
"""

import asyncio
import os
import shutil
import signal
import uuid
from pathlib import Path

import structlog

from toile.cli.platform import processes
from toile.cli.platform.board import Board
from toile.cli.platform.keeper import Keeper, PartDiedError
from toile.cli.platform.parts import SERVICES, Plan
from toile.cli.platform.plan import plan_platform
from toile.cli.platform.state import (
    PartStatus,
    Paths,
    ProcessId,
    read_state,
    supervisor_lock,
)
from toile.cli.platform.triton_parts import open_environment, remove_shared_memory
from toile.core.errors import FailedPreconditionError, ToileError
from toile.core.logging import configure
from toile.core.settings import Settings
from toile.diffusion.triton.server import TritonEnvironment

EXIT_FAILED = 1
EXIT_ALREADY_RUNNING = 75

log = structlog.get_logger()


def main() -> int:
    """Run the platform of the settings until told to stop."""
    settings = Settings()
    configure(settings, process="platform")
    paths = Paths.of(settings)
    with supervisor_lock(paths.lock) as taken:
        if not taken:
            return EXIT_ALREADY_RUNNING
        remove_remains(paths)
        _turn_logs(paths)
        try:
            plan = plan_platform(settings, uuid.uuid4().hex, _triton(settings))
        except ToileError as error:
            log.exception("no_plan", why=error.message)
            return EXIT_FAILED
        return asyncio.run(Supervisor(plan, paths).run())


def _triton(settings: Settings) -> TritonEnvironment | None:
    """Return what holds the Triton server, if there is one; it is not needed to draw.

    Raises:
        FailedPreconditionError: The settings name an environment, and it does not work.
    """
    try:
        return open_environment(settings)
    except FailedPreconditionError as error:
        if settings.triton_environment is not None:
            raise
        log.warning("no_triton", why=error.message)
        return None


def remove_remains(paths: Paths) -> None:
    """Remove what a supervisor left that was killed. The caller holds the lock."""
    state = read_state(paths.state)
    if state is not None:
        processes.sweep(state.id, wait_seconds=0.0)
        remove_shared_memory(state.id)
        if state.scratch:
            shutil.rmtree(state.scratch, ignore_errors=True)
    paths.state.unlink(missing_ok=True)


class Supervisor:
    """Owns all keepers."""

    def __init__(self, plan: Plan, paths: Paths) -> None:
        self._plan = plan
        self._paths = paths
        self._told_to_stop = asyncio.Event()

    async def run(self) -> int:
        """Bring everything up, keep it up until told to stop, take it down."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop.set)
        me = ProcessId.of(os.getpid())
        if me is None:
            raise RuntimeError("this process does not find itself")
        board = Board(self._plan, self._paths, me)
        keepers = [Keeper(part, board, self._paths) for part in self._plan.parts]
        tasks = {asyncio.create_task(keeper.keep()): keeper for keeper in keepers}
        watch = asyncio.create_task(_note_when_ready(board))
        stop = asyncio.create_task(self._told_to_stop.wait())
        try:
            await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            failed = _first_failure(tasks, board)
        finally:
            for task in (*tasks, watch, stop):
                task.cancel()
            await asyncio.gather(*tasks, watch, stop, return_exceptions=True)
        await self._take_down(keepers, board, failed)
        return EXIT_FAILED if failed else 0

    async def _take_down(self, keepers: list[Keeper], board: Board, failed: str) -> None:
        """Stop the services together, then what they stand on, then make sure."""
        if not failed:
            board.update(status=PartStatus.STOPPING)
        await asyncio.gather(*(k.stop() for k in keepers if k.part.name in SERVICES))
        for keeper in reversed([k for k in keepers if k.part.name not in SERVICES]):
            await keeper.stop()
        await asyncio.to_thread(processes.sweep, self._plan.id)
        remove_shared_memory(self._plan.id)
        await asyncio.to_thread(shutil.rmtree, self._plan.scratch, ignore_errors=True)
        log.info("platform_stopped", failed=failed)
        if failed:
            board.update(status=PartStatus.FAILED)
        else:
            self._paths.state.unlink(missing_ok=True)


async def _note_when_ready(board: Board) -> None:
    names = [part.name for part in board.state.parts if not part.background]
    await board.until(lambda: board.ready(names))
    seconds = round(board.seconds, 2)
    log.info("platform_ready", seconds=seconds)
    board.update(status=PartStatus.READY, ready_seconds=seconds)


def _first_failure(tasks: dict[asyncio.Task[None], Keeper], board: Board) -> str:
    """Return the name of a part whose first start failed, noted on the board; else nothing."""
    for task, keeper in tasks.items():
        if not task.done():
            continue
        error = task.exception()
        if not isinstance(error, PartDiedError):
            log.error("keeper_failed", part=keeper.part.name, exc_info=error)
        message = f"{keeper.part.name} {error}"
        board.update_part(keeper.part.name, status=PartStatus.FAILED, message=str(error))
        board.update(status=PartStatus.FAILED, message=message)
        return keeper.part.name
    return ""


def _turn_logs(paths: Paths) -> None:
    """Begin new logs and keep those of the run before."""
    paths.logs.mkdir(parents=True, exist_ok=True)
    own = paths.log("platform")
    for path in paths.logs.glob("*.log"):
        if path != own:
            path.replace(Path(f"{path}.1"))
