"""Keyset paging: pages stay right while rows come and go, and cost the same far down."""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, TypeDecorator, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from toile.core.errors import InvalidArgumentError

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000


def page(
    session: Session,
    statement: Select[Any],
    keys: Sequence[InstrumentedAttribute[Any]],
    *,
    page_size: int,
    page_token: str,
    scope: str,
    descending: bool = False,
) -> tuple[list[Any], str]:
    """Return one page of rows, and the token of the next page ("" on the last).

    Args:
        session: Where to read.
        statement: A select of one mapped class, not ordered; the rows are its objects.
        keys: Columns of that class that order the rows, unique together; str, int or datetime.
        page_size: Rows wanted; 0 gives 50, and more than 1000 gives 1000.
        page_token: What the page before returned; "" for the first.
        scope: What is listed, such as "ListDatasets projects/p"; a token fits only its scope.
        descending: Order from the last to the first.

    Raises:
        InvalidArgumentError: The size is negative, or the token is not of this list.
    """
    if page_size < 0:
        raise InvalidArgumentError("page_size must not be negative", field="page_size")
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    if page_token:
        after = _decode(page_token, scope, keys)
        row = tuple_(*keys)
        statement = statement.where(row < after if descending else row > after)
    order = [key.desc() if descending else key.asc() for key in keys]
    rows = list(session.scalars(statement.order_by(*order).limit(size + 1)))
    if len(rows) <= size:
        return rows, ""
    rows = rows[:size]
    return rows, _encode(scope, [getattr(rows[-1], key.key) for key in keys])


def _encode(scope: str, values: Sequence[str | int | datetime]) -> str:
    plain = [v.isoformat() if isinstance(v, datetime) else v for v in values]
    text = json.dumps([_fingerprint(scope), *plain], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode(token: str, scope: str, keys: Sequence[InstrumentedAttribute[Any]]) -> tuple[Any, ...]:
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        content = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        fingerprint, *plain = content
        if fingerprint != _fingerprint(scope):
            raise ValueError("a token of another list")
        return tuple(_value(key, value) for key, value in zip(keys, plain, strict=True))
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise InvalidArgumentError(
            "page_token is not one that this list returned",
            field="page_token",
            reason="BAD_PAGE_TOKEN",
        ) from error


def _value(key: InstrumentedAttribute[Any], value: object) -> object:
    kind = key.type.impl_instance if isinstance(key.type, TypeDecorator) else key.type
    if kind.python_type is datetime and isinstance(value, str):
        return datetime.fromisoformat(value)
    if type(value) is not kind.python_type:
        raise ValueError(f"not a value of {key.key}")
    return value


def _fingerprint(scope: str) -> str:
    return hashlib.sha256(scope.encode()).hexdigest()[:12]
