"""Who and what the current task works for; feeds log lines and job records."""

import contextlib
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Context:
    """Identity of the work in hand. Empty strings where it is not known."""

    request_id: str = ""
    project: str = ""
    job: str = ""


_NOBODY = Context()
_current: ContextVar[Context] = ContextVar("toile_context")


def current() -> Context:
    """Return the context of the running task or thread."""
    return _current.get(_NOBODY)


@contextlib.contextmanager
def bind(**identity: str) -> Iterator[Context]:
    """Set fields of the context for the length of a block."""
    context = replace(current(), **identity)
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def new_id() -> str:
    """Return a fresh identifier: 32 hexadecimal digits that sort by time (UUIDv7's layout)."""
    millis = time.time_ns() // 1_000_000
    random = uuid.uuid4().int & ((1 << 74) - 1)
    high, low = random >> 62, random & ((1 << 62) - 1)
    return f"{(millis << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low:032x}"
