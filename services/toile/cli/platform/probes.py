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


def http_answers(url: str) -> Probe:
    """Ask a page, which must come with status 200."""

    async def probe() -> bool:
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            try:
                answer = await client.get(url)
            except httpx.HTTPError:
                return False
            return answer.status_code == httpx.codes.OK

    return probe
