"""How much memory the platform holds while a loop runs."""

import os
import threading

import psutil

from toile.cli.platform import processes
from toile.cli.platform.state import PlatformState

_INTERVAL_SECONDS = 2.0


class MemorySampler:
    """Samples all processes of the platform and this one; keeps the peak.

    Pages that processes share are counted once (PSS), so the sum is what the machine gives.
    """

    def __init__(self, state: PlatformState | None) -> None:
        """Watch a platform of this machine; without one, peaks are 0."""
        self._supervisor = state.supervisor.process() if state is not None else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self._step_peak = self._held = 0
        self.peak_bytes = 0

    def __enter__(self) -> "MemorySampler":
        if self._supervisor is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def take_step_peak(self) -> int:
        """Return the peak since the last call."""
        # What was held at the last look still is: a step may end before the next one.
        peak, self._step_peak = self._step_peak, self._held
        return peak

    def _sample(self) -> None:
        me = psutil.Process(os.getpid())
        while self._supervisor is not None:
            members = {p.pid: p for p in (me, *processes.family(self._supervisor))}
            self._held = processes.memory_bytes(members.values())
            self._step_peak = max(self._step_peak, self._held)
            self.peak_bytes = max(self.peak_bytes, self._held)
            if self._stop.wait(_INTERVAL_SECONDS):
                return
