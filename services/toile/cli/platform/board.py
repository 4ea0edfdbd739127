"""Where the keepers of the parts write what they see, and wait for one another."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toile.cli.platform.parts import Plan
from toile.cli.platform.state import (
    PartState,
    PartStatus,
    Paths,
    PlatformState,
    ProcessId,
    write_state,
)


class Board:
    """The state of the platform; every change goes to the state file."""

    def __init__(self, plan: Plan, paths: Paths, supervisor: ProcessId) -> None:
        self._path: Path = paths.state
        self._began = time.time()
        self._changed = asyncio.Event()
        self._epochs = {part.name: 0 for part in plan.parts}
        self.state = PlatformState(
            id=plan.id,
            supervisor=supervisor,
            status=PartStatus.STARTING,
            addresses=plan.addresses,
            ray_address=plan.ray_address,
            scratch=str(plan.scratch),
            parts=tuple(
                PartState(
                    name=part.name,
                    address=part.address,
                    metrics_address=part.metrics_address,
                    log=str(paths.log(part.name)),
                    background=part.background,
                )
                for part in plan.parts
            ),
        )
        write_state(self._path, self.state)

    @property
    def seconds(self) -> float:
        """Seconds since the supervisor's process began."""
        return time.time() - min(self._began, self.state.supervisor.created)

    def part(self, name: str) -> PartState:
        """Return what is known of a part."""
        return next(part for part in self.state.parts if part.name == name)

    def epoch(self, name: str) -> int:
        """Return how often a part has become ready."""
        return self._epochs[name]

    def update_part(self, name: str, **changes: Any) -> None:
        """Note a change of a part."""
        if changes.get("status") is PartStatus.READY:
            self._epochs[name] += 1
        self.update(
            parts=tuple(
                part.model_copy(update=changes) if part.name == name else part
                for part in self.state.parts
            )
        )

    def update(self, **changes: Any) -> None:
        """Note a change of the platform."""
        self.state = self.state.model_copy(update=changes)
        write_state(self._path, self.state)
        self._changed.set()
        self._changed = asyncio.Event()

    def ready(self, names: Sequence[str]) -> bool:
        """Say whether parts are ready."""
        return all(self.part(name).status is PartStatus.READY for name in names)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; it is asked again after each change."""
        while not condition():
            await self._changed.wait()
