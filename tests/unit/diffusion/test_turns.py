"""Turns: by priority, then by arrival, within a capacity, a limit and a deadline."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from toile.core.errors import CancelledError, ComputeUnavailableError, DeadlineError, ExhaustedError
from toile.diffusion.turns import NO_HURRY, Turns, Urgency

SECONDS = 30.0


class Crowd:
    """Callers that each hold their turn until they are told to go."""

    def __init__(self, turns: Turns, pool: ThreadPoolExecutor) -> None:
        self._turns, self._pool = turns, pool
        self.came: list[str] = []
        self._doors: dict[str, threading.Event] = {}

    def comes(self, name: str, urgency: Urgency = NO_HURRY, cost: int = 1) -> Future[None]:
        """Send a caller and wait until it is in the queue or in."""
        self._doors[name] = threading.Event()
        seen = self._size()
        future = self._pool.submit(self._hold, name, urgency, cost)
        until(lambda: self._size() > seen)
        return future

    def goes(self, name: str) -> None:
        """Let a caller end its turn."""
        self._doors[name].set()

    def _hold(self, name: str, urgency: Urgency, cost: int) -> None:
        with self._turns.turn(urgency, cost, most_seconds=SECONDS):
            self.came.append(name)
            self._doors[name].wait(SECONDS)

    def _size(self) -> int:
        return self._turns.waiting + len(self.came)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as made:
        yield made


def test_who_is_waited_for_goes_first_and_then_who_came_first(pool: ThreadPoolExecutor) -> None:
    crowd = Crowd(Turns(1), pool)
    crowd.comes("in")
    crowd.comes("batch 1", Urgency(priority=2))
    crowd.comes("batch 2", Urgency(priority=2))
    crowd.comes("person 1")
    crowd.comes("person 2")
    order = ["in", "person 1", "person 2", "batch 1", "batch 2"]
    for count, name in enumerate(order, 1):
        until(lambda count=count: len(crowd.came) == count)
        assert crowd.came == order[:count]
        crowd.goes(name)


def test_as_many_are_in_as_their_costs_allow(pool: ThreadPoolExecutor) -> None:
    turns = Turns(4)
    crowd = Crowd(turns, pool)
    for name, cost in (("a", 2), ("b", 2), ("large", 9), ("small", 1)):
        crowd.comes(name, cost=cost)
    assert crowd.came == ["a", "b"]
    crowd.goes("a")
    time.sleep(0.05)
    assert crowd.came == ["a", "b"], "the small one overtook the large one"
    crowd.goes("b")
    until(lambda: crowd.came == ["a", "b", "large"])
    crowd.goes("large")
    until(lambda: crowd.came == ["a", "b", "large", "small"])
    crowd.goes("small")
    until(lambda: turns.waiting == 0)


def test_a_full_queue_refuses_and_takes_again(pool: ThreadPoolExecutor) -> None:
    turns = Turns(1, waiting_limit=2)
    crowd = Crowd(turns, pool)
    for name in ("in", "first", "second"):
        crowd.comes(name)
    with pytest.raises(ExhaustedError), turns.turn(NO_HURRY, most_seconds=SECONDS):
        pass
    crowd.goes("in")
    until(lambda: turns.waiting == 1)
    crowd.comes("third")
    for name in ("first", "second", "third"):
        crowd.goes(name)
    until(lambda: crowd.came == ["in", "first", "second", "third"])


def test_who_waits_too_long_is_told_and_does_not_stand_in_the_way(
    pool: ThreadPoolExecutor,
) -> None:
    turns = Turns(2)
    crowd = Crowd(turns, pool)
    crowd.comes("in")
    late = crowd.comes("late", Urgency(deadline=time.monotonic() + 0.2), cost=2)
    crowd.comes("behind it")
    with pytest.raises(DeadlineError):
        late.result(SECONDS)
    until(lambda: crowd.came == ["in", "behind it"])
    with (
        pytest.raises(DeadlineError),
        turns.turn(Urgency(deadline=time.monotonic() - 1), most_seconds=SECONDS),
    ):
        pass
    for name in ("in", "behind it"):
        crowd.goes(name)


def test_who_waits_longer_than_a_turn_may_take_is_told_that_it_is_not_to_be_had(
    pool: ThreadPoolExecutor,
) -> None:
    """That is no deadline of the caller's: the same may work later."""
    turns = Turns(1)
    crowd = Crowd(turns, pool)
    crowd.comes("in")
    with pytest.raises(ComputeUnavailableError), turns.turn(NO_HURRY, most_seconds=0.01):
        pass
    crowd.goes("in")
    until(lambda: turns.waiting == 0)
    with turns.turn(NO_HURRY, most_seconds=SECONDS):
        pass


def test_who_leaves_gives_its_place_in_the_queue_back(pool: ThreadPoolExecutor) -> None:
    turns = Turns(1)
    crowd = Crowd(turns, pool)
    crowd.comes("in")
    left = threading.Event()
    leaving = crowd.comes("leaving", Urgency(cancelled=left.is_set))
    crowd.comes("behind it")
    left.set()
    with pytest.raises(CancelledError):
        leaving.result(SECONDS)
    assert turns.waiting == 1
    crowd.goes("in")
    until(lambda: crowd.came == ["in", "behind it"])
    crowd.goes("behind it")


def test_a_turn_that_fails_is_given_back() -> None:
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), turns.turn(NO_HURRY, most_seconds=1.0):
            _ = 1 / 0


def test_no_turn_is_lost_or_given_twice_among_many(pool: ThreadPoolExecutor) -> None:
    turns = Turns(3)
    lock = threading.Lock()
    inside = most = done = late = 0

    def work(number: int) -> None:
        nonlocal inside, most, done, late
        for turn in range(150):
            urgency = Urgency(1 + number % 2, time.monotonic() + (0.0005 if turn % 5 else 30))
            try:
                with turns.turn(urgency, 1 + number % 3, most_seconds=SECONDS):
                    with lock:
                        inside += 1 + number % 3
                        most = max(most, inside)
                    time.sleep(0.0002)
                    with lock:
                        inside -= 1 + number % 3
                        done += 1
            except DeadlineError:
                with lock:
                    late += 1

    for future in [pool.submit(work, number) for number in range(12)]:
        future.result(120)
    assert done + late == 12 * 150
    assert done >= 12 * 30
    assert most == 3
    assert turns.waiting == 0
