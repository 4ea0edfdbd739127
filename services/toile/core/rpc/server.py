"""The scaffold of every service process."""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from toile.core import logging as logs
from toile.core import metrics
from toile.core.errors import ToileError, UnavailableError
from toile.core.rpc.interceptor import ErrorInterceptor
from toile.core.rpc.readiness import Readiness
from toile.core.settings import Settings

_HANDLER_THREADS = 32
_KEEPALIVE_MILLIS = 30_000
_LEAVING_SECONDS = 3.0  # for threads that nobody waits for any more
_RESTART_SECONDS = (1.0, 30.0)  # first and longest pause before a failed background task

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class Service:
    """What one process serves.

    Attributes:
        name: Short name, such as "dataset".
        add: Pairs of a generated `add_…Servicer_to_server` and the servicer.
        full_names: The services' full names, such as "toile.v1.DatasetService".
        checks: Named readiness checks; each raises when what it looks at is away.
        background: Coroutine functions that run as long as the server; restarted when they fail.
    """

    name: str
    add: Sequence[tuple[Callable[[Any, Any], None], Any]]
    full_names: Sequence[str]
    checks: Mapping[str, Callable[[], None]]
    background: Sequence[Callable[[], Awaitable[None]]] = ()


class RunningService:
    """A started service. `port` and `metrics_port` are the ones really taken."""

    def __init__(
        self,
        server: grpc.aio.Server,
        readiness: Readiness,
        tasks: Sequence[asyncio.Task[None]],
        port: int,
        metrics_port: int,
        stop_metrics: Callable[[], None],
        grace_seconds: float,
    ) -> None:
        self.port = port
        self.metrics_port = metrics_port
        self._server = server
        self._readiness = readiness
        self._tasks = tasks
        self._stop_metrics = stop_metrics
        self._grace_seconds = grace_seconds

    async def ready(self) -> None:
        """Wait until all checks have passed once."""
        await self._readiness.ready()

    async def stop(self) -> None:
        """Stop: not serving, no new calls, running calls get the grace time, then cancel."""
        await self._readiness.stop()
        await self._server.stop(self._grace_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._stop_metrics)


async def start(service: Service, settings: Settings) -> RunningService:
    """Start a service in the running event loop.

    Raises:
        UnavailableError: A port is taken.
    """
    asyncio.get_running_loop().set_default_executor(
        ThreadPoolExecutor(_HANDLER_THREADS, thread_name_prefix="handler")
    )
    try:
        metrics_port, stop_metrics = metrics.serve(settings.host, settings.metrics_port)
    except OSError as error:
        raise UnavailableError(
            f"metrics port {settings.metrics_port} of {settings.host} is taken: {error}"
        ) from error
    interceptor = ErrorInterceptor(service.full_names, settings.default_deadline_seconds)
    server = grpc.aio.server(interceptors=[interceptor], options=_options(settings))
    for add, servicer in service.add:
        add(servicer, server)
    statuses = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
    reflection.enable_server_reflection(
        [*service.full_names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        port = server.add_insecure_port(f"{settings.host}:{settings.port}")
    except RuntimeError as error:
        await asyncio.to_thread(stop_metrics)
        raise UnavailableError(f"port {settings.port} of {settings.host} is taken") from error
    readiness = Readiness(statuses, service.full_names, service.checks)
    await readiness.start()
    await server.start()
    tasks = [asyncio.create_task(_keep_running(work)) for work in service.background]
    _log.info("listening", port=port, metrics_port=metrics_port)
    return RunningService(
        server, readiness, tasks, port, metrics_port, stop_metrics, settings.grace_seconds
    )


def run(build: Callable[[Settings], Service]) -> None:
    """Be a service process: everything from reading the settings to the last call's end."""
    try:
        settings = Settings()
    except ValueError as error:  # pydantic's ValidationError, pydantic-settings' SettingsError
        sys.exit(f"bad settings: {error}")
    logs.configure(settings, "toile")
    try:
        service = build(settings)
        logs.configure(settings, service.name)
        asyncio.run(_serve(service, settings))
    except ToileError as error:
        _log.critical("stopped", reason=error.reason, message=error.message)
        sys.exit(1)
    except Exception:  # noqa: BLE001 - the last resort: the trace goes to the log
        _log.critical("stopped", exc_info=True)
        sys.exit(1)


async def _serve(service: Service, settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    running = await start(service, settings)
    announcing = asyncio.create_task(_announce(service, running, settings.ready_file))
    await stopping.wait()
    _log.info("stopping")
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)
    await running.stop()
    # A thread cannot be cancelled: one that is stuck must not keep the process.
    leaving = threading.Timer(_LEAVING_SECONDS, _leave)
    leaving.daemon = True
    leaving.start()


def _leave() -> None:
    _log.warning("left threads behind", threads=[t.name for t in threading.enumerate()])
    os._exit(0)


async def _announce(service: Service, running: RunningService, path: Path | None) -> None:
    """Tell a supervisor, once the service is ready, where it listens."""
    await running.ready()
    line = json.dumps(
        {
            "event": "ready",
            "service": service.name,
            "port": running.port,
            "metrics_port": running.metrics_port,
            "pid": os.getpid(),
        }
    )
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    if path is not None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(line + "\n")
        scratch.replace(path)


async def _keep_running(work: Callable[[], Awaitable[None]]) -> None:
    pause, longest = _RESTART_SECONDS
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - a failed task must not end the service
            _log.exception("background task failed", task=getattr(work, "__qualname__", str(work)))
        else:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest)


def _options(settings: Settings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.limits.message_bytes),
        ("grpc.max_send_message_length", settings.limits.message_bytes),
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server
        ("grpc.keepalive_time_ms", _KEEPALIVE_MILLIS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
