"""Measuring arms in turns, and what is said of the numbers."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence


def in_turns(arms: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every arm once a round, each round beginning with another one.

    Whatever else the machine does then meets all arms alike, and the values of one round can be
    compared as pairs.

    Args:
        arms: Each takes the round's number and returns its value.
        rounds: How many.
    """
    names = list(arms)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for shift in range(len(names)):
            name = names[(number + shift) % len(names)]
            values[name].append(arms[name](number))
    return values


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def side_by_side(clients: int, work: Callable[[int], None]) -> float:
    """Run something in a thread for each client, and return the seconds until the last is done."""
    start = threading.Barrier(clients + 1)
    errors: list[BaseException] = []

    def run(client: int) -> None:
        start.wait()
        try:
            work(client)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles, the extremes and the number of values."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p25": percentile(ordered, 25),
        "p75": percentile(ordered, 75),
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratio of each pair of values, taken in the same round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def differences(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the difference of each pair of values, taken in the same round."""
    return [a - b for a, b in zip(over, under, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
