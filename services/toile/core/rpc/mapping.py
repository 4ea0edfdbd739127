"""What every error means to a caller: the one place that knows."""

import asyncio
import errno

import grpc
import httpx
import pydantic
import structlog
import urllib3
from google.rpc import status_pb2
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
    UnavailableError,
)
from toile.core.rpc.wire import from_rpc_error, from_status, pack

INCIDENT = "incident"  # metadata key of errors whose cause only the log tells

__all__ = ["INCIDENT", "from_rpc_error", "from_status", "to_error", "to_status"]

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
        case ConnectionError():
            return UnavailableError("something behind the service does not answer")
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
    return pack(known)


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
