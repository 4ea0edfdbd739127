"""Turns at something that takes so much at once: who is waited for goes first."""

import contextlib
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from toile.core.errors import (
    CancelledError,
    ComputeUnavailableError,
    DeadlineError,
    ExhaustedError,
)

WAITING_LIMIT = 256
LOOK_SECONDS = 0.1
"""Who waits looks so often whether the drawing was cancelled."""


@dataclass(frozen=True)
class Urgency:
    """How soon the evaluations of a session are wanted."""

    priority: int = 1
    """1 goes first, 2 may wait; where several sessions want the same UNet."""
    deadline: float = math.inf
    """When they are of no use any more, by `time.monotonic()`."""
    cancelled: Callable[[], bool] = lambda: False
    """Whether they are of no use already; asked while they wait, too."""

    def seconds_left(self, most: float) -> float:
        """Return the seconds until the deadline, at most so many; see `check`."""
        self.check()
        return max(0.001, min(self.deadline - time.monotonic(), most))

    def check(self) -> None:
        """Do nothing as long as they are wanted.

        Raises:
            CancelledError: They are not.
            DeadlineError: The deadline is past.
        """
        if self.cancelled():
            raise CancelledError("the drawing was cancelled")
        if time.monotonic() >= self.deadline:
            raise DeadlineError("the drawing was not done in time")


NO_HURRY = Urgency()


@dataclass(order=True)
class _Waiter:
    priority: int
    serial: int
    cost: int = field(compare=False)
    admitted: threading.Event = field(default_factory=threading.Event, compare=False)
    gone: bool = field(default=False, compare=False)


class Turns:
    """Lets callers in by priority, and by arrival within one, as long as there is room.

    Nobody is overtaken for being large: the first in the queue is let in next, alone if it must be.
    """

    def __init__(self, capacity: int, *, waiting_limit: int = WAITING_LIMIT) -> None:
        """Make an empty one.

        Args:
            capacity: What the costs of those who are in may add up to; one who alone costs more
                is let in when nobody else is.
            waiting_limit: How many may wait.
        """
        self._capacity, self._waiting_limit = capacity, waiting_limit
        self._lock = threading.Lock()
        self._serials = itertools.count()
        self._queue: list[_Waiter] = []
        self.waiting = 0
        """How many wait now."""
        self._cost_inside = 0

    @contextlib.contextmanager
    def turn(
        self, urgency: Urgency, cost: int = 1, *, most_seconds: float = math.inf
    ) -> Iterator[None]:
        """Wait for a turn and hold it.

        Args:
            urgency: Its priority orders; its deadline and its cancellation end the wait.
            cost: What this turn takes of the capacity.
            most_seconds: How long to wait at most.

        Raises:
            CancelledError: It was cancelled meanwhile.
            DeadlineError: The turn did not come before the deadline.
            ComputeUnavailableError: It did not come in `most_seconds`.
            ExhaustedError: As many as may already wait.
        """
        urgency.check()
        waiter = self._join(urgency.priority, cost)
        try:
            until = time.monotonic() + most_seconds
            while not waiter.admitted.wait(urgency.seconds_left(LOOK_SECONDS)):
                if time.monotonic() >= until:
                    raise ComputeUnavailableError(
                        f"the drawing had no turn at the UNet in {most_seconds:g} seconds"
                    )
            yield
        finally:
            self._leave(waiter)

    def _join(self, priority: int, cost: int) -> _Waiter:
        waiter = _Waiter(priority, next(self._serials), cost)
        with self._lock:
            heapq.heappush(self._queue, waiter)
            self.waiting += 1
            self._admit()
            if not waiter.admitted.is_set() and self.waiting > self._waiting_limit:
                self._forget(waiter)
                raise ExhaustedError("too many drawings wait for the UNet; try again later")
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        """Give back a turn, or the place in the queue for it."""
        with self._lock:
            if waiter.admitted.is_set():
                self._cost_inside -= waiter.cost
            else:
                self._forget(waiter)
            self._admit()

    def _forget(self, waiter: _Waiter) -> None:
        waiter.gone = True
        self.waiting -= 1

    def _admit(self) -> None:
        while self._queue:
            first = self._queue[0]
            if first.gone:
                heapq.heappop(self._queue)
                continue
            if self._cost_inside and self._cost_inside + first.cost > self._capacity:
                return
            heapq.heappop(self._queue)
            self.waiting -= 1
            self._cost_inside += first.cost
            first.admitted.set()
