"""What a platform is made of: processes and tasks, and how they depend on one another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from toile.cli.platform.farewells import Farewell
from toile.cli.platform.probes import Probe

SERVICES = ("dataset", "train", "generate", "rank", "refine")


@dataclass(frozen=True)
class Part:
    """One process, or one task that ends.

    Attributes:
        name: Name in status and of the log.
        command: What to run.
        environment: All its variables.
        needs: Parts that must be ready before it starts.
        again_with: Part whose restart makes this task run again.
        ready: Says whether a process is ready; None for a task, which is ready when it ended well.
        address: Where it serves.
        metrics_address: Where its metrics are.
        before_end: Called before it is told to end; it never raises.
        grace_seconds: What it may take to end.
        scratch: Folder emptied before each start.
        first_attempts: How often its very first start is tried.
        background: The platform is ready, and stays up, without it; a task may take any time.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    needs: tuple[str, ...] = ()
    again_with: str = ""
    ready: Probe | None = None
    address: str = ""
    metrics_address: str = ""
    before_end: Farewell | None = None
    grace_seconds: float = 10.0
    scratch: Path | None = None
    first_attempts: int = 1
    background: bool = False


@dataclass(frozen=True)
class Plan:
    """All parts, and what clients need to know."""

    id: str
    parts: tuple[Part, ...]
    addresses: dict[str, str] = field(default_factory=dict)
    ray_address: str = ""
    scratch: Path = Path()
