"""Ways to ask a part whether it is ready."""

from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

Probe = Callable[[], Awaitable[bool]]
_TIMEOUT_SECONDS = 2.0


def health_serving(address: str) -> Probe:
    """Ask `grpc.health.v1` for the state of the whole server."""

    async def probe() -> bool:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return probe


def ray_head_alive(url: str, token: str) -> Probe:
    """Ask a Ray dashboard whether a node has joined and whether it takes jobs."""
    # One client for all times: each new one would load the system's certificates.
    client = httpx.AsyncClient(
        base_url=url,
        timeout=_TIMEOUT_SECONDS,
        trust_env=False,
        headers={"Authorization": f"Bearer {token}"},
    )

    async def probe() -> bool:
        try:
            nodes = await client.get("/nodes", params={"view": "hostnamelist"})
            jobs = await client.get("/api/jobs/")
            names = nodes.json()["data"]["hostNameList"] if nodes.is_success else []
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False
        return bool(names) and jobs.is_success

    return probe


def triton_ready(url: str) -> Probe:
    """Ask a Triton server whether it takes calls."""
    # A server that is told to end waits for connections that are kept.
    limits = httpx.Limits(max_keepalive_connections=0)
    client = httpx.AsyncClient(
        base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False, limits=limits
    )

    async def probe() -> bool:
        try:
            return (await client.get("/v2/health/ready")).is_success
        except httpx.HTTPError:
            return False

    return probe
