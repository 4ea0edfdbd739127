"""Idempotency: the same request id with the same content gets the first answer again."""

import hashlib

from google.protobuf.message import Message
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from toile.core.catalog.models import RequestRow
from toile.core.errors import InvalidArgumentError, RequestReusedError, UnavailableError

MAX_REQUEST_ID_CHARACTERS = 128


def request_digest(message: Message) -> str:
    """Return the SHA-256 of a request without its id, in hexadecimal."""
    content = type(message)()
    content.CopyFrom(message)
    if "request_id" in content.DESCRIPTOR.fields_by_name:
        content.ClearField("request_id")
    data = content.SerializeToString(deterministic=True)
    return hashlib.sha256(content.DESCRIPTOR.full_name.encode() + b"\0" + data).hexdigest()


def recall(session: Session, *, scope: str, request_id: str, digest: str) -> str | None:
    """Return what a request made when it was sent before; None the first time.

    Call it in the transaction that goes on to make the resource: equal requests sent at
    the same time then wait for one another here. An empty id is never recalled.

    Raises:
        RequestReusedError: The id was sent before with other content.
        InvalidArgumentError: The id is too long.
    """
    if not request_id:
        return None
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidArgumentError(
            f"request_id has {len(request_id)} characters; {MAX_REQUEST_ID_CHARACTERS} are "
            "the most",
            field="request_id",
        )
    if session.get_bind().dialect.name == "postgresql":
        key = hashlib.sha256(f"{scope}\0{request_id}".encode()).digest()[:8]
        lock = func.pg_advisory_xact_lock(int.from_bytes(key, signed=True))
        session.execute(select(lock))
    row = session.get(RequestRow, (scope, request_id), populate_existing=True)
    if row is None:
        return None
    if row.digest != digest:
        raise RequestReusedError(
            f"request id {request_id!r} was used before with other content",
            metadata={"request_id": request_id},
        )
    return row.resource


def remember(session: Session, *, scope: str, request_id: str, digest: str, resource: str) -> None:
    """Note what a request made, in the transaction that makes it. An empty id is not noted.

    Raises:
        RequestReusedError: The id was sent meanwhile with other content.
        UnavailableError: The same request was honoured meanwhile; sent again, it is recalled.
    """
    if not request_id:
        return
    row = RequestRow(scope=scope, request_id=request_id, digest=digest, resource=resource)
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError as error:
        recall(session, scope=scope, request_id=request_id, digest=digest)
        raise UnavailableError(
            f"request {request_id!r} is being answered already; send it again",
            reason="REQUEST_IN_PROGRESS",
        ) from error
