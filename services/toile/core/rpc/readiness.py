"""Readiness: `grpc.health.v1` says SERVING only while everything needed answers."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import structlog
from grpc_health.v1 import health, health_pb2

from toile.core.metrics import READY

INTERVAL_SECONDS = 2.0
CHECK_SECONDS = 5.0  # a check that takes longer has failed

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_log = structlog.stdlib.get_logger(__name__)


class Readiness:
    """Runs the checks every two seconds and keeps the health statuses."""

    def __init__(
        self,
        statuses: health.aio.HealthServicer,
        full_names: Sequence[str],
        checks: Mapping[str, Callable[[], None]],
    ) -> None:
        self._statuses = statuses
        self._names = ("", *full_names)
        self._checks = checks
        self._threads = ThreadPoolExecutor(max(len(checks), 1), thread_name_prefix="check")
        self._running: dict[str, Future[None]] = {}
        self._failing: dict[str, str] | None = None  # None before the first round
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Set every status to NOT_SERVING and begin to check."""
        for name in self._names:
            await self._statuses.set(name, _NOT_SERVING)
        self._task = asyncio.create_task(self._watch())

    async def ready(self) -> None:
        """Wait until all checks have passed once."""
        await self._ready.wait()

    async def stop(self) -> None:
        """Set every status to NOT_SERVING for good."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._statuses.enter_graceful_shutdown()
        READY.set(0)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            results = await asyncio.gather(*map(self._check, self._checks))
            failing = {name: problem for name, problem in results if problem}
            if failing != self._failing:
                await self._tell(failing)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _tell(self, failing: dict[str, str]) -> None:
        self._failing = failing
        status = _NOT_SERVING if failing else _SERVING
        for name in self._names:
            await self._statuses.set(name, status)
        READY.set(not failing)
        if failing:
            _log.warning("not serving", failing=failing)
        else:
            _log.info("serving")
            self._ready.set()

    async def _check(self, name: str) -> tuple[str, str]:
        """Return the check's name and what is wrong; "" when nothing is."""
        running = self._running.get(name)
        if running is None or running.done():  # a check that hangs is not started again
            running = self._running[name] = self._threads.submit(self._checks[name])
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await asyncio.shield(asyncio.wrap_future(running))
        except TimeoutError:
            return name, f"no answer within {CHECK_SECONDS:g} seconds"
        except Exception as error:  # noqa: BLE001 - whatever a check raises is the finding
            return name, str(error) or type(error).__name__
        return name, ""
