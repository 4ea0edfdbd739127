"""Clients of the services: typed stubs whose calls raise the errors of `core.errors`."""

import json
from collections.abc import Callable, Iterator
from functools import cached_property, reduce
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from toile.core.context import current, new_id
from toile.core.errors import ToileError, UnavailableError
from toile.core.rpc.wire import REQUEST_ID_KEY, ends_by_default, from_rpc_error
from toile.core.settings import Settings
from toile.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    generate_pb2,
    generate_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    rank_pb2,
    rank_pb2_grpc,
    refine_pb2,
    refine_pb2_grpc,
    train_pb2,
    train_pb2_grpc,
)

INFERENCE_APPLICATION = "toile"  # name of the Ray Serve application

_KEEPALIVE_MILLIS = 30_000
_READING = ("Get", "List", "Watch", "Download", "Cancel")  # safe to repeat without an id


class Clients:
    """Blocking stubs of all services, over channels that are opened on first use.

    Every call carries a request id, gets a deadline when it is given none (but for `Watch*`), and
    raises `ToileError`s; so does the iteration of a streamed answer. A request message whose
    `request_id` is empty gets one, so that a call can be repeated when the connection breaks.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channels: dict[str, grpc.Channel] = {}

    @cached_property
    def dataset(self) -> dataset_pb2_grpc.DatasetServiceStub:
        """The dataset service."""
        return dataset_pb2_grpc.DatasetServiceStub(self._channel("dataset"))

    @cached_property
    def train(self) -> train_pb2_grpc.TrainServiceStub:
        """The train service."""
        return train_pb2_grpc.TrainServiceStub(self._channel("train"))

    @cached_property
    def generate(self) -> generate_pb2_grpc.GenerateServiceStub:
        """The generate service."""
        return generate_pb2_grpc.GenerateServiceStub(self._channel("generate"))

    @cached_property
    def rank(self) -> rank_pb2_grpc.RankServiceStub:
        """The rank service."""
        return rank_pb2_grpc.RankServiceStub(self._channel("rank"))

    @cached_property
    def refine(self) -> refine_pb2_grpc.RefineServiceStub:
        """The refine service."""
        return refine_pb2_grpc.RefineServiceStub(self._channel("refine"))

    @cached_property
    def jobs(self) -> job_pb2_grpc.JobServiceStub:
        """Jobs of all kinds; whichever of the train and dataset services has an address."""
        service = "train" if self._settings.train_address else "dataset"
        return job_pb2_grpc.JobServiceStub(self._channel(service))

    def close(self) -> None:
        """Close all channels; running calls are cancelled."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _channel(self, service: str) -> grpc.Channel:
        address: str = getattr(self._settings, f"{service}_address")
        if not address:
            raise UnavailableError(
                f"no address of the {service} service is known (TOILE_{service.upper()}_ADDRESS)",
                reason="NO_ADDRESS",
                metadata={"service": service},
            )
        if address not in self._channels:
            channel = grpc.insecure_channel(address, _options(self._settings))
            self._channels[address] = grpc.intercept_channel(
                channel, _ClientInterceptor(address, self._settings.default_deadline_seconds)
            )
        return self._channels[address]


def inference_channel(settings: Settings) -> grpc.aio.Channel:
    """Open a channel to the models, which Ray Serve's gRPC proxy answers for.

    Its calls raise plain `grpc.aio.AioRpcError`s, which the servers' interceptor maps.

    Raises:
        UnavailableError: The settings have no address.
    """
    if not settings.inference_address:
        raise UnavailableError(
            "no address of the models is known (TOILE_INFERENCE_ADDRESS)",
            reason="NO_ADDRESS",
            metadata={"service": "inference"},
        )
    return grpc.aio.insecure_channel(
        settings.inference_address,
        options=_limits(settings.limits.inference_message_bytes),
        interceptors=[_ToApplicationUnary(), _ToApplicationStream()],
    )


def grpc_health_check(address: str, service: str = "", timeout_seconds: float = 2.0) -> bool:
    """Say whether a server answers at an address and is ready."""
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_seconds)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class _Details(grpc.ClientCallDetails):
    """Details of a call with what every call of ours has."""

    def __init__(
        self,
        details: grpc.ClientCallDetails,
        metadata: tuple[tuple[str, str | bytes], ...],
        timeout: float | None,
    ) -> None:
        self.method = details.method
        self.timeout = timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class _ClientInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Identity, deadline and typed errors for the calls of one channel; all four kinds."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds

    def intercept_unary_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request: Any,
    ) -> Any:
        return self._call(continuation, client_call_details, _with_id(request))

    def intercept_unary_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request: Any,
    ) -> Any:
        return self._call(continuation, client_call_details, _with_id(request))

    def intercept_stream_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        return self._call(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        return self._call(continuation, client_call_details, request_iterator)

    def _call(
        self,
        continuation: Callable[..., Any],
        details: grpc.ClientCallDetails,
        request: Any,
    ) -> Any:
        metadata = tuple(details.metadata or ())
        if REQUEST_ID_KEY not in (key for key, _ in metadata):
            metadata = (*metadata, (REQUEST_ID_KEY, current().request_id or new_id()))
        timeout = details.timeout
        if timeout is None and ends_by_default(str(details.method)):
            timeout = self._timeout_seconds
        ours = _Details(details, metadata, timeout)
        return _Answer(continuation(ours, request), self._convert)

    def _convert(self, error: grpc.RpcError) -> ToileError:
        known = from_rpc_error(error)
        if type(known) is UnavailableError and known.reason == UnavailableError.default_reason:
            known = UnavailableError(
                f"nothing answers at {self._address} ({known.message})",
                metadata={"address": self._address},
            )
        for item in error.trailing_metadata() or ():
            if item.key == REQUEST_ID_KEY:
                known.add_note(f"request id {item.value!s}")
        return known


class _Answer:
    """A call in progress, as gRPC gives it, whose errors are ours."""

    def __init__(self, call: Any, convert: Callable[[grpc.RpcError], ToileError]) -> None:
        self._call = call
        self._convert = convert

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._call.result(timeout)
        except grpc.RpcError as error:
            raise self._convert(error) from error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error: BaseException | None = self._call.exception(timeout)
        return self._convert(error) if isinstance(error, grpc.RpcError) else error

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except grpc.RpcError as error:
            raise self._convert(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _ToApplicationUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        return await continuation(_to_application(client_call_details), request)


class _ToApplicationStream(grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        return await continuation(_to_application(client_call_details), request_iterator)


def _to_application(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("application", INFERENCE_APPLICATION)
    metadata.add(REQUEST_ID_KEY, current().request_id or new_id())
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


def _with_id(request: Message) -> Message:
    """Fill in an empty request id, of the message or of the request that it holds."""
    path = _path_to_id(request.DESCRIPTOR)
    if path is None:
        return request
    filled = type(request)()
    filled.CopyFrom(request)
    holder: Any = reduce(getattr, path, filled)
    holder.request_id = holder.request_id or new_id()
    return filled


def _path_to_id(message: Any) -> tuple[str, ...] | None:
    """Return the fields that lead to a message's request id; None if it has none."""
    if "request_id" in message.fields_by_name:
        return ()
    for field in message.fields:
        if field.message_type is not None and "request_id" in field.message_type.fields_by_name:
            return (field.name,)
    return None


def _options(settings: Settings) -> list[tuple[str, Any]]:
    return [
        *_limits(settings.limits.message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MILLIS),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", _service_config()),
    ]


def _limits(most_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", most_bytes),
        ("grpc.max_send_message_length", most_bytes),
    ]


def _service_config() -> str:
    """Return gRPC's own retry policy, for the calls that may be repeated."""
    names = [
        {"service": service.full_name, "method": method.name}
        for file in (dataset_pb2, generate_pb2, job_pb2, rank_pb2, refine_pb2, train_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.name.startswith(_READING) or _path_to_id(method.input_type) is not None
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.2s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})
