"""Reading a server's stream on the client's side."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_READ_AHEAD = 16
_LOOK_SECONDS = 0.05


class ServerStream(Protocol[T_co]):
    """A call whose answers come one by one."""

    def __iter__(self) -> Iterator[T_co]: ...

    def cancel(self) -> bool:
        """End the call."""
        ...


@contextmanager
def reading(start: Callable[[], ServerStream[T]]) -> Iterator[Iterator[T]]:
    """Give the answers of the call that `start` makes; leaving the block cancels what is left.

    A thread of its own makes and reads the call, since Ctrl-C raises wherever the main thread is:
    raised inside grpc it can leave a call that never ends, and closing the channel would wait for
    it for ever.
    """
    arrived: Queue[_Arrival[T]] = Queue(_READ_AHEAD)
    started: Future[ServerStream[T]] = Future()
    context = copy_context()  # a call's request id is the caller's
    reader = Thread(target=context.run, args=(_read, start, started, arrived), daemon=True)
    reader.start()
    try:
        yield _answers(arrived)
    finally:
        if started.exception() is None:
            started.result().cancel()
        while reader.is_alive():
            with suppress(Empty):  # the reader may be waiting for room
                arrived.get(timeout=_LOOK_SECONDS)


@dataclass(frozen=True)
class _Arrival(Generic[T]):
    """An answer, or how the stream ended."""

    answer: T | None = None
    error: Exception | None = None


def _read(
    start: Callable[[], ServerStream[T]],
    started: Future[ServerStream[T]],
    arrived: Queue[_Arrival[T]],
) -> None:
    try:
        started.set_result(start())
        for answer in started.result():
            arrived.put(_Arrival(answer))
        arrived.put(_Arrival())
    except Exception as error:  # noqa: BLE001 - raised again by the thread that waits for it
        if not started.done():
            started.set_exception(error)
        arrived.put(_Arrival(error=error))


def _answers(arrived: Queue[_Arrival[T]]) -> Iterator[T]:
    while True:
        arrival = arrived.get()
        if arrival.error is not None:
            raise arrival.error
        if arrival.answer is None:
            return
        yield arrival.answer
