"""What all figures share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.engine import Exported
from serve.scale import Scale

from toile.diffusion.bundle import Bundle
from toile.diffusion.triton.server import TritonEnvironment


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    scale: Scale
    scratch: Path
    """Removed at the end."""
    home: Path
    """`TOILE_HOME` of the platforms, one after another; stays."""
    bundle: Bundle
    exported: Exported
    environment: TritonEnvironment
    threads: int
    """Of ONNX Runtime and of torch, in every arm."""
    say: Callable[[str], None]
    run: dict[str, Any]
    """Of `machine.watched`: processes that are not waited for add their `own_seconds`."""

    @property
    def size(self) -> int:
        """Side of the base's own images, pixels."""
        return self.bundle.native_size
