"""A platform in a home of its own, driven by the real `toile` command."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toile.cli.platform.processes import marked
from toile.cli.platform.state import read_state

# On a machine with nothing else to do `toile up` takes less than a minute.
PATIENCE_SECONDS = 900.0


@dataclass(frozen=True)
class Home:
    """A `TOILE_HOME` with the random bundle as its base."""

    folder: Path
    bundle: Path

    @property
    def environment(self) -> dict[str, str]:
        """What `toile` needs to work in this home."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOILE_", "RAY_"))}
        return {
            **kept,
            "TOILE_HOME": str(self.folder),
            "TOILE_BASE_PATH": str(self.bundle),
            "OMP_NUM_THREADS": "1",
            "TOILE_CPU_THREADS": "1",  # other tests keep the cores busy
        }

    def command(self, *arguments: object) -> list[str]:
        """Return a command line."""
        return [sys.executable, "-m", "toile.cli", *(str(a) for a in arguments)]

    def toile(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def json(self, *arguments: object) -> Any:
        """Run a command that must succeed and return what it wrote."""
        done = self.toile(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def status(self) -> Any:
        """Return the parts, whether ready or not."""
        return json.loads(self.toile("status", "--json").stdout)

    def platform_id(self) -> str:
        """Return the mark of the running platform's processes."""
        state = read_state(self.folder / "run" / "platform.json")
        assert state is not None
        return state.id

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Poll the status until something holds of it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            status: dict[str, Any] = self.status()
            if wanted(status):
                return status
            time.sleep(1.0)
        raise AssertionError(f"it never came: {self.status()}")


def part(status: dict[str, Any], name: str) -> dict[str, Any]:
    """Return one part of a status."""
    return next(p for p in status["parts"] if p["name"] == name)


def nothing_left(platform_id: str) -> bool:
    """Say whether all processes of a platform are gone, Ray's included."""
    return not marked(platform_id)
