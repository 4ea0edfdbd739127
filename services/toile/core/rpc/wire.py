"""Errors on the wire: `google.rpc.Status` with an ErrorInfo, and back to the same class."""

from collections.abc import Iterator

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from toile.core.errors import ToileError

REQUEST_ID_KEY = "x-request-id"  # metadata key, both ways
DOMAIN = "toile"  # of every ErrorInfo

_KIND = "kind"  # metadata key on the wire: tells the class where the reason does not
# Trailers share 8 KiB of headers with everything else.
_MAX_MESSAGE_CHARACTERS = 1000
_MAX_VALUE_CHARACTERS = 300
_MAX_FACTS = 8


def ends_by_default(method: str) -> bool:
    """Say whether a call that was given no deadline gets the default one.

    What watches other work lasts as long as that work does.
    """
    return not method.rpartition("/")[2].startswith("Watch")


def pack(error: ToileError) -> status_pb2.Status:
    """Return the status that an error travels as."""
    message = _cut(error.message, _MAX_MESSAGE_CHARACTERS)
    details: list[Message] = [_info(error)]
    if field := error.metadata.get("field"):
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    status = status_pb2.Status(code=error.status.value[0], message=message)
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
