"""The machine, and how busy others kept it."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

QUIET_LOAD = 1.0
QUIET_SECONDS = 60.0

_HERE = ("torch", "diffusers", "peft", "onnxruntime", "numpy", "ray", "grpcio")
_THERE = ("nvidia-pytriton", "onnxruntime", "numpy")


def facts() -> dict[str, Any]:
    """Return what absolute times depend on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _HERE},
    }


def triton_versions(site_packages: Path) -> dict[str, str]:
    """Return the versions of what Triton's own environment holds."""
    there = {
        found.metadata["Name"].lower(): found.version
        for found in importlib.metadata.distributions(path=[str(site_packages)])
    }
    return {name: there.get(name, "") for name in _THERE}


def wait_until_quiet(minutes: float) -> bool:
    """Wait until the load average was low for a minute; say whether it came to that."""
    deadline = time.monotonic() + 60 * minutes
    quiet_since = None
    while True:
        load, now = os.getloadavg()[0], time.monotonic()
        quiet_since = (quiet_since or now) if load < QUIET_LOAD else None
        if quiet_since is not None and now - quiet_since >= QUIET_SECONDS:
            return True
        if now >= deadline:
            return False
        print(f"load {load:.2f}, waiting for less than {QUIET_LOAD}", file=sys.stderr)
        time.sleep(min(10.0, max(0.0, deadline - now)))


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Fill in when a figure was measured, and what others took of the processors meanwhile.

    Processes that are not waited for by this one are others, so whoever starts some adds their
    seconds to `own_seconds`.
    """
    run: dict[str, Any] = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
        "own_seconds": 0.0,
    }
    busy, own, started = _busy_seconds(), _own_seconds(), time.monotonic()
    yield run
    took = time.monotonic() - started
    ours = run.pop("own_seconds") + _own_seconds() - own
    cores = psutil.cpu_count() or 1
    run["seconds"] = took
    run["others_share"] = max(0.0, _busy_seconds() - busy - ours) / (took * cores)


def _busy_seconds() -> float:
    """Seconds that all processors worked, also for other machines on the same host."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
