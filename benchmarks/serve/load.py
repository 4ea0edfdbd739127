"""Requests that come when they come: a Poisson mix of short and long drawings."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from measuring.timing import in_turns, percentile

SHORT_STEPS, LONG_STEPS = 8, 40
SHORT_SHARE = 0.8
MEAN_STEPS = SHORT_SHARE * SHORT_STEPS + (1 - SHORT_SHARE) * LONG_STEPS
LOAD = 0.7
"""Share of the measured capacity that is offered."""
_CALLERS = 512

Draw = Callable[[int, int], Any]
"""Draws an image of so many steps from a seed, and returns when its caller has it."""


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at_seconds: float
    steps: int
    seed: int


def poisson_trace(requests_per_second: float, seconds: float, seed: int) -> list[Arrival]:
    """Return arrivals with exponential gaps, at least one; the same seed gives the same trace."""
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    arrivals: list[Arrival] = []
    now = chance.expovariate(requests_per_second)
    while now < seconds or not arrivals:
        steps = SHORT_STEPS if chance.random() < SHORT_SHARE else LONG_STEPS
        arrivals.append(Arrival(now, steps, len(arrivals)))
        now += chance.expovariate(requests_per_second)
    return arrivals


def replay(trace: Sequence[Arrival], draw: Draw) -> dict[str, list[float]]:
    """Send each request at its time, whatever became of those before.

    Args:
        trace: The requests.
        draw: What serves them.

    Returns:
        Seconds from the time of the request until its caller had the image, of `short` and of
        `long` ones.
    """
    latencies: dict[str, list[float]] = {"short": [], "long": []}
    started = time.perf_counter()

    def call(arrival: Arrival) -> None:
        draw(arrival.steps, arrival.seed)
        kind = "short" if arrival.steps == SHORT_STEPS else "long"
        latencies[kind].append(time.perf_counter() - started - arrival.at_seconds)

    with ThreadPoolExecutor(_CALLERS) as callers:
        sent = []
        for arrival in trace:
            time.sleep(max(0.0, started + arrival.at_seconds - time.perf_counter()))
            sent.append(callers.submit(call, arrival))
        for future in sent:
            future.result()
    return latencies


def under_load(
    draws: Mapping[str, Draw], requests_per_second: float, trace_seconds: float, rounds: int
) -> dict[str, Any]:
    """Replay the same traces against several servers in turns, another trace each round.

    Returns:
        By server: p50, p95 and longest latency of short and of long requests, over all rounds,
        and the raw seconds of each round.
    """
    raw: dict[str, list[dict[str, list[float]]]] = {name: [] for name in draws}

    def arm(name: str) -> Callable[[int], float]:
        def run(number: int) -> float:
            trace = poisson_trace(requests_per_second, trace_seconds, seed=number)
            raw[name].append(replay(trace, draws[name]))
            return 0.0

        return run

    in_turns({name: arm(name) for name in draws}, rounds)
    return {
        name: {"latency_seconds": latency_summary(parts), "raw": parts}
        for name, parts in raw.items()
    }


def latency_summary(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Return p50, p95, the longest and the number of each kind that there was, in seconds."""
    summary = {}
    for kind in ("short", "long"):
        values = [value for part in parts for value in part[kind]]
        if values:
            summary[kind] = {
                "p50": percentile(values, 50),
                "p95": percentile(values, 95),
                "max": max(values),
                "n": len(values),
            }
    return summary
