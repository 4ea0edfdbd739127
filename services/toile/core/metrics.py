"""Prometheus metrics: one registry a process, served on a port of its own."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

RPC_DURATION = Histogram(
    "toile_rpc_duration_seconds",
    "Time from the arrival of a call to its end, streams included.",
    ("service", "method", "code"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 150, 300, 600),
    registry=REGISTRY,
)
RPC_IN_FLIGHT = Gauge(
    "toile_rpc_in_flight", "Calls being answered.", ("service", "method"), registry=REGISTRY
)
READY = Gauge(
    "toile_ready", "1 while everything that the service depends on answers.", registry=REGISTRY
)


def serve(host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Serve the process's metrics over HTTP; return the port and a function that stops it.

    Raises:
        OSError: The port is taken.
    """
    server, thread = start_http_server(port, host, REGISTRY)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
