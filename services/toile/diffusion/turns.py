"""Turns at something that takes so much at once: who is waited for goes first."""

import contextlib
import heapq
import itertools
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from toile.core.errors import DeadlineError, ExhaustedError

WAITING_LIMIT = 256


@dataclass(frozen=True)
class Urgency:
    """How soon the evaluations of a session are wanted."""

    priority: int = 1
    """1 goes first, 2 may wait; where several sessions want the same UNet."""
    deadline: float = math.inf
    """When they are of no use any more, by `time.monotonic()`."""

    def seconds_left(self, most: float) -> float:
        """Return the seconds until the deadline, at most so many.

        Raises:
            DeadlineError: It is past.
        """
        self.check()
        return max(0.001, min(self.deadline - time.monotonic(), most))

    def check(self) -> None:
        """Raise `DeadlineError` when the deadline is past."""
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
    def turn(self, urgency: Urgency, cost: int = 1, *, most_seconds: float) -> Iterator[None]:
        """Wait for a turn and hold it.

        Args:
            urgency: Its priority orders; its deadline ends the wait.
            cost: What this turn takes of the capacity.
            most_seconds: How long to wait at most.

        Raises:
            DeadlineError: The turn did not come in time.
            ExhaustedError: As many as may already wait.
        """
        seconds = urgency.seconds_left(most_seconds)
        waiter = self._join(urgency.priority, cost)
        if not waiter.admitted.wait(seconds) and self._leave(waiter):
            raise DeadlineError("the drawing did not get its turn in time")
        try:
            yield
        finally:
            with self._lock:
                self._cost_inside -= cost
                self._admit()

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

    def _leave(self, waiter: _Waiter) -> bool:
        """Give up waiting; False when the turn came meanwhile."""
        with self._lock:
            if waiter.admitted.is_set():
                return False
            self._forget(waiter)
            self._admit()
            return True

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
