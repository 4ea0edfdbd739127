"""Readiness of the models: whether Ray Serve runs the application at the inference address."""

import grpc

from toile.core.errors import ComputeUnavailableError
from toile.core.rpc.client import INFERENCE_APPLICATION
from toile.core.settings import Settings

_METHOD = "/ray.serve.RayServeAPIService/ListApplications"
_TIMEOUT_SECONDS = 3.0


def check_models(settings: Settings) -> None:
    """Ask Ray Serve's gRPC proxy for its applications; for a service's readiness checks.

    A server that answers but is no such proxy passes: then it is the models itself.

    Raises:
        ComputeUnavailableError: Nothing answers, or the application is not there yet.
    """
    if not settings.inference_address:
        raise ComputeUnavailableError("no address of the models is known", reason="NO_ADDRESS")
    with grpc.insecure_channel(
        settings.inference_address, [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        try:
            # Messages stay bytes: their classes come with Ray, which services do without.
            call = channel.unary_unary(
                _METHOD, request_serializer=bytes, response_deserializer=bytes
            )
            answer = call(b"", timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return
            raise ComputeUnavailableError(
                f"nothing answers at {settings.inference_address}: {error.details()}"
            ) from error
    name = INFERENCE_APPLICATION.encode()
    # ListApplicationsResponse: field 1, a repeated string.
    if b"\x0a" + bytes([len(name)]) + name not in answer:
        raise ComputeUnavailableError("Ray Serve runs, but not the models yet")
