"""Every error that Toile raises on purpose.

    ToileError
    ├── InvalidArgumentError      INVALID_ARGUMENT     the request itself is wrong
    │   ├── BadImageError         INVALID_ARGUMENT     an image file that cannot be used
    │   └── TriggerWordError      INVALID_ARGUMENT     a trigger word that the tokenizer cannot keep
    ├── NotFoundError             NOT_FOUND
    ├── AlreadyExistsError        ALREADY_EXISTS
    │   └── RequestReusedError    ALREADY_EXISTS       an id sent again with other content
    ├── FailedPreconditionError   FAILED_PRECONDITION  wrong state, such as an unbuilt dataset
    ├── ExhaustedError            RESOURCE_EXHAUSTED   full queue or quota; try later
    │   └── DiskFullError         RESOURCE_EXHAUSTED
    ├── DataLossError             DATA_LOSS            stored bytes do not match their digest
    ├── UnavailableError          UNAVAILABLE          something behind is away; retrying may help
    │   ├── StoreUnavailableError     the object store
    │   ├── CatalogUnavailableError   the database
    │   └── ComputeUnavailableError   Ray, or an application on it
    ├── CancelledError            CANCELLED
    └── DeadlineError             DEADLINE_EXCEEDED

Each class has a gRPC status and a stable machine-readable reason. The one interceptor in
`core.rpc` turns them into `google.rpc.ErrorInfo` details, and back into the same classes on
the client's side.
"""

from collections.abc import Mapping
from typing import ClassVar

import grpc


class ToileError(Exception):
    """Base of all errors that Toile raises on purpose.

    Attributes:
        status: gRPC status code the error travels as.
        reason: Stable, machine-readable, UPPER_SNAKE_CASE.
        message: One line for a person.
        metadata: Facts about the error, such as `{"field": "dataset"}`.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the way back from a Ray worker with reason and metadata."""
        return (_rebuild, (type(self), self.message, self.reason, self.metadata))


def _rebuild(
    cls: type[ToileError], message: str, reason: str, metadata: dict[str, str]
) -> ToileError:
    return cls(message, reason=reason, metadata=metadata)


class InvalidArgumentError(ToileError):
    """The request is wrong; sending it again cannot help. `field` names the culprit."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        facts = dict(metadata or {})
        if field is not None:
            facts["field"] = field
        super().__init__(message, reason=reason, metadata=facts)


class BadImageError(InvalidArgumentError):
    """An image file that cannot be used."""

    default_reason = "BAD_IMAGE"


class TriggerWordError(InvalidArgumentError):
    """A trigger word that the base's tokenizer cannot keep."""

    default_reason = "TRIGGER_WORD"


class NotFoundError(ToileError):
    """A resource that does not exist, or is not visible to the caller."""

    status = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExistsError(ToileError):
    """A resource that is already there."""

    status = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class RequestReusedError(AlreadyExistsError):
    """A request id that was sent before with other content."""

    default_reason = "REQUEST_ID_REUSED"


class FailedPreconditionError(ToileError):
    """The right request in the wrong state, such as training on an unbuilt dataset."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class ExhaustedError(ToileError):
    """A full queue or quota; the same request may work later."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class DiskFullError(ExhaustedError):
    """No space is left where artifacts or the catalog live."""

    default_reason = "DISK_FULL"


class DataLossError(ToileError):
    """Stored bytes do not match their digest."""

    status = grpc.StatusCode.DATA_LOSS
    default_reason = "DATA_LOSS"


class UnavailableError(ToileError):
    """Something behind a service is away; retrying may help."""

    status = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class StoreUnavailableError(UnavailableError):
    """The artifact store does not answer."""

    default_reason = "STORE_UNAVAILABLE"


class CatalogUnavailableError(UnavailableError):
    """The database does not answer."""

    default_reason = "CATALOG_UNAVAILABLE"


class ComputeUnavailableError(UnavailableError):
    """Ray, or an application on it, does not answer."""

    default_reason = "COMPUTE_UNAVAILABLE"


class CancelledError(ToileError):
    """The work was cancelled."""

    status = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class DeadlineError(ToileError):
    """The deadline passed before the work was done."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"
