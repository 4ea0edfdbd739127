"""What every error means to a caller."""

import asyncio
import errno
import inspect
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import minio.error
import pydantic
import pytest
import sqlalchemy.exc
import urllib3.exceptions
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from toile.core import errors
from toile.core.rpc.mapping import from_rpc_error, to_error, to_status


class Answered(grpc.RpcError):
    """What a client's stub raises."""

    def __init__(self, status: status_pb2.Status | None = None, **plain: Any) -> None:
        rich = rpc_status.to_status(status) if status is not None else None
        self._code = rich.code if rich else plain["code"]
        self._details = rich.details if rich else plain["details"]
        self._trailers = rich.trailing_metadata if rich else ()

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailers


def tree(kind: type[errors.ToileError]) -> Iterator[type[errors.ToileError]]:
    for child in kind.__subclasses__():
        yield child
        yield from tree(child)


# Those that every side of a call knows; the CLI's own never cross a wire.
KINDS = [kind for kind in tree(errors.ToileError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("reason", [None, "SOMETHING_SPECIAL"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_arrives_as_it_was_sent(kind: type[errors.ToileError], reason: str | None) -> None:
    sent = kind("what went wrong", reason=reason, metadata={"field": "prompt", "limit": "7"})
    got = from_rpc_error(Answered(to_status(sent)))
    assert type(got) is kind
    assert (got.message, got.reason, got.metadata) == (sent.message, sent.reason, sent.metadata)


def test_a_field_is_also_told_the_standard_way() -> None:
    status = to_status(errors.InvalidArgumentError("too long", field="prompt"))
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(request)
    assert (info.reason, info.domain) == ("INVALID_ARGUMENT", "toile")
    assert [(v.field, v.description) for v in request.field_violations] == [("prompt", "too long")]


def test_a_bug_tells_only_its_incident() -> None:
    status = to_status(KeyError("/secret/path"))
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert b"secret" not in status.SerializeToString()
    error = from_rpc_error(Answered(status))
    assert type(error) is errors.ToileError
    assert error.metadata["incident"] in error.message


def test_a_long_error_still_fits_into_trailers() -> None:
    facts = {f"key{i}": "v" * 10_000 for i in range(100)}
    status = to_status(errors.NotFoundError("ä" * 100_000, metadata=facts))
    assert len(status.SerializeToString()) < 6000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.CANCELLED, errors.CancelledError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ExhaustedError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ToileError),
        (grpc.StatusCode.UNKNOWN, errors.ToileError),
    ],
)
def test_what_grpc_itself_answers_has_a_class_too(
    code: grpc.StatusCode, kind: type[errors.ToileError]
) -> None:
    error = from_rpc_error(Answered(code=code, details="because"))
    assert type(error) is kind
    assert error.message == "because"
    if kind is errors.ToileError:
        assert error.reason == code.name


def test_a_backend_s_typed_error_goes_through() -> None:
    answered = Answered(to_status(errors.InvalidArgumentError("no such sampler", field="s")))
    assert type(to_error(answered)) is errors.InvalidArgumentError


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND])
def test_an_absent_backend_is_compute(code: grpc.StatusCode) -> None:
    error = to_error(Answered(code=code, details="no route"))
    assert type(error) is errors.ComputeUnavailableError


def test_a_backend_s_bug_is_ours() -> None:
    answered = Answered(code=grpc.StatusCode.UNKNOWN, details="Traceback: /secret")
    assert to_error(answered) is None


class Config(pydantic.BaseModel):
    rank: pydantic.PositiveInt
    steps: int


def test_a_wrong_model_names_its_fields() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate({"rank": 0, "steps": "x"})
    error = to_error(caught.value)
    assert type(error) is errors.InvalidArgumentError
    assert error.metadata == {"field": "rank"}
    assert "steps: " in error.message


def test_the_rest_of_what_python_raises() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert type(to_error(full)) is errors.DiskFullError
    assert type(to_error(TimeoutError())) is errors.DeadlineError
    assert type(to_error(asyncio.CancelledError())) is errors.CancelledError
    assert type(to_error(ConnectionRefusedError())) is errors.UnavailableError
    assert type(to_error(MemoryError())) is errors.ExhaustedError
    assert to_error(PermissionError(errno.EACCES, "no")) is None


def s3_error(code: str) -> minio.error.S3Error:
    return minio.error.S3Error(
        code=code,
        message="m",
        resource="r",
        request_id="i",
        host_id="h",
        response=None,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NoSuchKey", errors.NotFoundError),
        ("PreconditionFailed", errors.AlreadyExistsError),
        ("XMinioStorageFull", errors.DiskFullError),
        ("AccessDenied", errors.StoreUnavailableError),
        ("SlowDown", errors.StoreUnavailableError),
    ],
)
def test_the_object_store_s_answers(code: str, kind: type[errors.ToileError]) -> None:
    assert type(to_error(s3_error(code))) is kind


def raised_by(module: Any) -> set[type[Exception]]:
    return {
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception)
        and not issubclass(kind, Warning)
        and kind.__module__ == module.__name__
    }


def bare(kind: type[Exception]) -> Exception:
    """Return an instance, whatever its constructor wants."""
    return kind.__new__(kind)


# A proxy's settings, read when the client is made; and an API that is not used.
UNREACHED = {urllib3.exceptions.ProxySchemeUnsupported, minio.error.MinioAdminException}


@pytest.mark.parametrize(
    "kind", sorted(raised_by(urllib3.exceptions) - UNREACHED, key=lambda k: k.__name__)
)
def test_every_error_of_urllib3_is_the_store(kind: type[Exception]) -> None:
    assert type(to_error(bare(kind))) is errors.StoreUnavailableError


@pytest.mark.parametrize(
    "kind", sorted(raised_by(minio.error) - UNREACHED, key=lambda k: k.__name__)
)
def test_every_error_of_minio_is_mapped(kind: type[Exception]) -> None:
    error = s3_error("InternalError") if kind is minio.error.S3Error else bare(kind)
    assert type(to_error(error)) is errors.StoreUnavailableError


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_the_cluster_s_http_is_compute(kind: Callable[[str], Exception]) -> None:
    assert type(to_error(kind("no"))) is errors.ComputeUnavailableError


SQL_MEANINGS: dict[type[Exception], type[errors.ToileError]] = {
    sqlalchemy.exc.OperationalError: errors.CatalogUnavailableError,
    sqlalchemy.exc.InterfaceError: errors.CatalogUnavailableError,
    sqlalchemy.exc.InternalError: errors.CatalogUnavailableError,
    sqlalchemy.exc.TimeoutError: errors.CatalogUnavailableError,
    sqlalchemy.exc.DisconnectionError: errors.CatalogUnavailableError,
    sqlalchemy.exc.InvalidatePoolError: errors.CatalogUnavailableError,
    sqlalchemy.exc.DataError: errors.InvalidArgumentError,
    sqlalchemy.exc.NoResultFound: errors.NotFoundError,
}
SQL_BUGS = {
    sqlalchemy.exc.AmbiguousColumnError,
    sqlalchemy.exc.AmbiguousForeignKeysError,
    sqlalchemy.exc.ArgumentError,
    sqlalchemy.exc.AwaitRequired,
    sqlalchemy.exc.CircularDependencyError,
    sqlalchemy.exc.CompileError,
    sqlalchemy.exc.DBAPIError,
    sqlalchemy.exc.DatabaseError,
    sqlalchemy.exc.DuplicateColumnError,
    sqlalchemy.exc.IdentifierError,
    sqlalchemy.exc.IllegalStateChangeError,
    sqlalchemy.exc.InvalidRequestError,
    sqlalchemy.exc.MissingGreenlet,
    sqlalchemy.exc.MultipleResultsFound,
    sqlalchemy.exc.NoForeignKeysError,
    sqlalchemy.exc.NoInspectionAvailable,
    sqlalchemy.exc.NoReferenceError,
    sqlalchemy.exc.NoReferencedColumnError,
    sqlalchemy.exc.NoReferencedTableError,
    sqlalchemy.exc.NoSuchColumnError,
    sqlalchemy.exc.NoSuchModuleError,
    sqlalchemy.exc.NoSuchTableError,
    sqlalchemy.exc.NotSupportedError,
    sqlalchemy.exc.ObjectNotExecutableError,
    sqlalchemy.exc.PendingRollbackError,
    sqlalchemy.exc.ProgrammingError,
    sqlalchemy.exc.ResourceClosedError,
    sqlalchemy.exc.SQLAlchemyError,
    sqlalchemy.exc.StatementError,
    sqlalchemy.exc.UnboundExecutionError,
    sqlalchemy.exc.UnreflectableTableError,
    sqlalchemy.exc.UnsupportedCompilationError,
    # Names that came with SQLAlchemy 2.1, and the drivers' stand-in.
    *(
        getattr(sqlalchemy.exc, name)
        for name in ("ConstraintColumnNotFoundError", "EmulatedDBAPIException", "NoDBAPILoaded")
        if hasattr(sqlalchemy.exc, name)
    ),
}


def sql_error(kind: type[Exception], original: Exception) -> Exception:
    if issubclass(kind, sqlalchemy.exc.DBAPIError):
        return kind("SELECT 1", {}, original)
    return bare(kind)


def test_every_error_of_sqlalchemy_was_thought_about() -> None:
    known = set(SQL_MEANINGS) | SQL_BUGS | {sqlalchemy.exc.IntegrityError}
    assert raised_by(sqlalchemy.exc) == known


@pytest.mark.parametrize(("kind", "meaning"), SQL_MEANINGS.items())
def test_a_database_error_has_its_meaning(
    kind: type[Exception], meaning: type[errors.ToileError]
) -> None:
    class OriginalError(Exception):
        sqlstate = None

    assert type(to_error(sql_error(kind, OriginalError()))) is meaning


@pytest.mark.parametrize("kind", sorted(SQL_BUGS, key=lambda k: k.__name__))
def test_wrong_use_of_the_database_is_a_bug(kind: type[Exception]) -> None:
    assert to_error(sql_error(kind, Exception())) is None


def sqlite_error(statement: str) -> sqlite3.Error:
    connection = sqlite3.connect(":memory:")
    connection.executescript(
        """
        PRAGMA foreign_keys=ON;
        CREATE TABLE a (k PRIMARY KEY, n NOT NULL);
        CREATE TABLE b (k REFERENCES a(k));
        INSERT INTO a VALUES (1, 1);
        """
    )
    try:
        connection.execute(statement)
    except sqlite3.Error as error:
        return error
    finally:
        connection.close()
    raise AssertionError(statement)


@pytest.mark.parametrize(
    ("statement", "meaning"),
    [
        ("INSERT INTO a VALUES (1, 2)", errors.AlreadyExistsError),
        ("INSERT INTO b VALUES (7)", errors.FailedPreconditionError),
        ("INSERT INTO a VALUES (2, NULL)", None),
    ],
)
def test_a_broken_constraint_on_sqlite(
    statement: str, meaning: type[errors.ToileError] | None
) -> None:
    error = sql_error(sqlalchemy.exc.IntegrityError, sqlite_error(statement))
    assert to_error(error).__class__ is (meaning or type(None))


@pytest.mark.parametrize(
    ("sqlstate", "meaning"),
    [
        ("23505", errors.AlreadyExistsError),
        ("23503", errors.FailedPreconditionError),
        ("23502", None),
        ("53100", errors.DiskFullError),
    ],
)
def test_a_broken_constraint_on_postgresql(
    sqlstate: str, meaning: type[errors.ToileError] | None
) -> None:
    original = Exception("x")
    original.sqlstate = sqlstate  # type: ignore[attr-defined]
    error = sql_error(sqlalchemy.exc.IntegrityError, original)
    assert to_error(error).__class__ is (meaning or type(None))
