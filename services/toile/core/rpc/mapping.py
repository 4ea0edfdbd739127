"""Errors to `google.rpc.Status` and back: the one place that knows what each of them means."""

import asyncio
import errno
from collections.abc import Iterator

import grpc
import httpx
import pydantic
import structlog
import urllib3
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from minio.error import MinioException, S3Error
from sqlalchemy.exc import SQLAlchemyError

from toile.core.catalog.engine import translate
from toile.core.context import new_id
from toile.core.errors import (
    AlreadyExistsError,
    CancelledError,
    ComputeUnavailableError,
    DeadlineError,
    DiskFullError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    StoreUnavailableError,
    ToileError,
)

DOMAIN = "toile"
INCIDENT = "incident"  # metadata key of errors whose cause only the log tells
_KIND = "kind"  # metadata key on the wire: tells the class where the reason does not
# Trailers share 8 KiB of headers with everything else.
_MAX_MESSAGE_CHARACTERS = 1000
_MAX_VALUE_CHARACTERS = 300
_MAX_FACTS = 8

_S3_ERRORS: dict[str, type[ToileError]] = {
    "NoSuchKey": NotFoundError,
    "NoSuchVersion": NotFoundError,
    "PreconditionFailed": AlreadyExistsError,
    "EntityTooLarge": InvalidArgumentError,
    "QuotaExceeded": DiskFullError,
    "XMinioStorageFull": DiskFullError,
    "XMinioAdminBucketQuotaExceeded": DiskFullError,
}

_log = structlog.stdlib.get_logger(__name__)


def to_error(error: BaseException) -> ToileError | None:
    """Return what any error means to a caller; None if it is a bug."""
    match error:
        case ToileError():
            return error if error.status is not grpc.StatusCode.INTERNAL else None
        case asyncio.CancelledError():
            return CancelledError("the call was cancelled")
        case TimeoutError():
            return DeadlineError("the deadline passed before the work was done")
        case pydantic.ValidationError():
            return _invalid(error)
        case SQLAlchemyError():
            return translate(error)
        case S3Error():
            kind = _S3_ERRORS.get(error.code, StoreUnavailableError)
            return kind(f"the object store answered {error.code}")
        case MinioException() | urllib3.exceptions.HTTPError():
            return StoreUnavailableError("the object store does not answer")
        case httpx.HTTPError():
            return ComputeUnavailableError("the compute cluster does not answer")
        case grpc.RpcError():
            return _backend_error(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DiskFullError("no space is left on the disk")
        case MemoryError():
            return ExhaustedError("not enough memory for this request", reason="OUT_OF_MEMORY")
    return None


def to_status(error: BaseException) -> status_pb2.Status:
    """Return the status that an error travels as.

    A bug becomes INTERNAL with an incident id; its trace goes to the log and nowhere else.
    """
    known = to_error(error)
    if known is None:
        known = _incident(error)
    message = _cut(known.message, _MAX_MESSAGE_CHARACTERS)
    details: list[error_details_pb2.ErrorInfo | error_details_pb2.BadRequest] = [_info(known)]
    if field := known.metadata.get("field"):
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    status = status_pb2.Status(code=known.status.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_rpc_error(error: grpc.RpcError) -> ToileError:
    """Return the error that a server raised, as this side's class.

    What gRPC itself or a foreign server answered becomes the class of its status code.
    """
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    code: grpc.StatusCode = error.code()
    kind = _BY_STATUS.get(code, ToileError)
    reason = None if kind is not ToileError else code.name
    return kind(error.details() or code.name, reason=reason)


def from_status(status: status_pb2.Status) -> ToileError:
    """Return the error that a status stands for."""
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    kind = _BY_STATUS.get(code, ToileError)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            metadata = dict(info.metadata)
            kind = _BY_REASON.get((code, metadata.pop(_KIND, info.reason)), kind)
            return kind(status.message, reason=info.reason, metadata=metadata)
    reason = None if kind is not ToileError else code.name
    return kind(status.message or code.name, reason=reason)


def _backend_error(error: grpc.RpcError) -> ToileError | None:
    if not hasattr(error, "code"):  # never sent, such as a call on a closed channel
        return ComputeUnavailableError("the models cannot be reached")
    known = from_rpc_error(error)
    if rpc_status.from_call(error) is None and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.NOT_FOUND,  # what Ray Serve answers while the application is away
    ):
        return ComputeUnavailableError("the models do not answer")
    return None if known.status is grpc.StatusCode.INTERNAL else known


def _invalid(error: pydantic.ValidationError) -> InvalidArgumentError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    fields = [".".join(map(str, problem["loc"])) for problem in problems]
    lines = [
        f"{field}: {problem['msg']}" if field else problem["msg"]
        for field, problem in zip(fields, problems, strict=True)
    ]
    return InvalidArgumentError("; ".join(lines), field=next(filter(None, fields), None))


def _incident(error: BaseException) -> ToileError:
    incident = new_id()
    _log.error("incident", incident=incident, exc_info=error)
    return ToileError(f"internal error, incident {incident}", metadata={INCIDENT: incident})


def _info(error: ToileError) -> error_details_pb2.ErrorInfo:
    metadata = {
        key: _cut(value, _MAX_VALUE_CHARACTERS)
        for key, value in list(error.metadata.items())[:_MAX_FACTS]
    }
    if error.reason != error.default_reason:
        metadata[_KIND] = error.default_reason
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _tree(kind: type[ToileError]) -> Iterator[type[ToileError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_BY_STATUS: dict[grpc.StatusCode, type[ToileError]] = {
    kind.status: kind for kind in ToileError.__subclasses__()
}
_BY_REASON: dict[tuple[grpc.StatusCode, str], type[ToileError]] = {
    (kind.status, kind.default_reason): kind for kind in _tree(ToileError)
}
