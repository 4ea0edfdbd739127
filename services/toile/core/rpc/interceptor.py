"""What surrounds every call: identity, deadline, errors, metrics, one log line."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from toile.core.context import bind, current, new_id
from toile.core.errors import DeadlineError
from toile.core.metrics import RPC_DURATION, RPC_IN_FLIGHT
from toile.core.names import ID
from toile.core.rpc.mapping import to_status
from toile.core.rpc.wire import REQUEST_ID_KEY, ends_by_default

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_log = structlog.stdlib.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]  # generic for checkers only


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns whatever a handler raises into a status with details; nothing else may.

    Handlers run within `core.context`, under the client's deadline or the default one, and
    are cancelled when the client goes away, streams too.
    """

    def __init__(self, services: Collection[str], default_deadline_seconds: float) -> None:
        """Make the interceptor.

        Args:
            services: Full names of the services whose calls must end; a health watch need not.
            default_deadline_seconds: Deadline of a call whose client gave none; `Watch*` have no
                default one.
        """
        self._services = frozenset(services)
        self._default_deadline_seconds = default_deadline_seconds

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """Wrap the handler of one call; all four kinds."""
        handler = await continuation(handler_call_details)
        if handler is None:  # a method that nobody serves: gRPC answers UNIMPLEMENTED
            return None
        service, method = handler_call_details.method.lstrip("/").split("/", 1)
        ours = service in self._services
        call = _Call(
            service=service,
            method=method,
            metadata=dict(handler_call_details.invocation_metadata or ()),
            deadline_seconds=(
                self._default_deadline_seconds if ours and ends_by_default(method) else None
            ),
            quiet=not ours,  # health checks come every few seconds
        )
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            inner: Any = handler.stream_stream or handler.unary_stream
            wrap = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return wrap(call.answering(_writing(inner)), **codec)
        inner = handler.stream_unary or handler.unary_unary
        wrap = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return wrap(call.answering(inner), **codec)


class _Call:
    """One call, from its arrival to its end."""

    def __init__(
        self,
        *,
        service: str,
        method: str,
        metadata: dict[str, str | bytes],
        deadline_seconds: float | None,
        quiet: bool,
    ) -> None:
        self.service = service
        self.method = method
        self.quiet = quiet
        self.deadline_seconds = deadline_seconds
        given = metadata.get(REQUEST_ID_KEY)
        valid = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        self.request_id = str(given) if valid else new_id()

    def answering(self, inner: Behaviour) -> Behaviour:
        """Return a handler that runs `inner` within everything that surrounds a call."""

        async def handle(request: Any, context: Context) -> Any:
            identity = {"request_id": self.request_id, "project": _project(request)}
            with bind(**identity), self._measured(context):
                context.set_trailing_metadata(((REQUEST_ID_KEY, self.request_id),))
                try:
                    return await self._in_time(inner(request, context), context)
                except grpc.aio.AbortError:
                    raise
                except asyncio.CancelledError as error:
                    if _cancelling():
                        raise
                    await self._fail(error, context)
                except NotImplementedError as error:
                    # The generated base class sets this code for what a servicer leaves out.
                    if _code(context) is grpc.StatusCode.UNIMPLEMENTED:
                        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not served here")
                    await self._fail(error, context)
                except Exception as error:  # noqa: BLE001 - the one place that maps them all
                    await self._fail(error, context)

        return handle

    async def _in_time(self, answer: Awaitable[Any], context: Context) -> Any:
        # With a deadline of the client's, gRPC itself cancels the handler when it passes.
        limit = self.deadline_seconds if context.time_remaining() is None else None
        try:
            async with asyncio.timeout(limit) as timeout:
                return await answer
        except TimeoutError as error:
            if timeout.expired():
                raise DeadlineError(f"not done within {limit:g} seconds") from error
            raise

    async def _fail(self, error: BaseException, context: Context) -> None:
        status = rpc_status.to_status(to_status(error))
        trailers = (*status.trailing_metadata, (REQUEST_ID_KEY, self.request_id))
        await context.abort(status.code, status.details, trailers)

    @contextlib.contextmanager
    def _measured(self, context: Context) -> Iterator[None]:
        labels = {"service": self.service, "method": self.method}
        start = time.perf_counter()
        code = grpc.StatusCode.OK
        with RPC_IN_FLIGHT.labels(**labels).track_inprogress():
            try:
                yield
            except grpc.aio.AbortError:
                code = _code(context)
                raise
            except asyncio.CancelledError:
                late = context.time_remaining() == 0
                code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
                raise
            except BaseException:
                code = grpc.StatusCode.UNKNOWN
                raise
            finally:
                seconds = time.perf_counter() - start
                RPC_DURATION.labels(**labels, code=code.name).observe(seconds)
                self._tell(code, seconds)

    def _tell(self, code: grpc.StatusCode, seconds: float) -> None:
        _log.log(
            logging.DEBUG if self.quiet else logging.INFO,
            "call",
            service=self.service,
            method=self.method,
            code=code.name,
            duration_seconds=round(seconds, 4),
        )


def _writing(inner: Callable[[Any, Context], Any]) -> Behaviour:
    """Return a handler that writes a stream's messages itself.

    So the whole call runs in one task: when the client goes away, also the handler's own
    generator is closed there and then, within its context.
    """

    async def write(request: Any, context: Context) -> None:
        answer = inner(request, context)
        if not isinstance(answer, AsyncIterable):
            await answer  # a handler that writes by itself
            return
        try:
            async for message in answer:
                await context.write(message)
        finally:
            if close := getattr(answer, "aclose", None):
                await close()

    return write


def _project(request: object) -> str:
    """Return the project in the `parent` or `name` of a request, or of one that it wraps."""
    wrapped = [getattr(request, field, None) for field in ("drawing", "request", "defaults")]
    for message in (request, *wrapped):
        for field in ("parent", "name"):
            parts = str(getattr(message, field, "")).split("/")
            if len(parts) >= 2 and parts[0] == "projects" and ID.fullmatch(parts[1]):
                return parts[1]
    return current().project


def _code(context: Context) -> grpc.StatusCode:
    code = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return _STATUS_CODES.get(number, grpc.StatusCode.UNKNOWN)


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
