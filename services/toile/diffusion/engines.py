"""Compiled engines: what they were built from and for, and whether they may be used here.

Free of TensorRT, which only `engine_builders` touches.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from toile.core.errors import FailedPreconditionError

FINGERPRINT_SUFFIX = ".json"

Range = tuple[int, int, int]
"""Least, what it is tuned for, most."""


@dataclass(frozen=True)
class EngineProfile:
    """The shapes that an engine takes. One engine takes all within them."""

    batch: Range = (1, 2, 16)
    """Samples; classifier-free guidance makes two of an image."""
    rank: Range = (1, 16, 64)
    """Sum of the ranks of a sample's adapters."""
    latent_size: Range = (16, 16, 32)
    """Height and width of the latents, each: an eighth of the picture's pixels."""
    tokens: Range = (77, 77, 231)
    """Length of the encoded prompt."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least, tuned, most = getattr(self, field.name)
            if not 1 <= least <= tuned <= most:
                raise ValueError(f"{field.name}: {least} <= {tuned} <= {most} does not hold")

    def shapes(self, name: str, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return least, tuned and most shape of an input whose open sizes are -1."""
        return tuple(
            tuple(
                size if size >= 0 else self._range(name, axis)[which]
                for axis, size in enumerate(shape)
            )
            for which in range(3)
        )

    def _range(self, name: str, axis: int) -> Range:
        if axis == 0:
            return self.batch
        if name == "sample":
            return self.latent_size
        if name == "encoder_hidden_states":
            return self.tokens
        return self.rank


@dataclass(frozen=True)
class Fingerprint:
    """What an engine was built from, by what, and for which GPUs; a JSON file beside it."""

    builder: str
    """`tensorrt` or `tensorrt-rtx`."""
    builder_version: str
    """An engine runs with the very version that built it."""
    compute_capabilities: tuple[str, ...]
    """GPUs it runs on, such as `8.6`."""
    profile: EngineProfile
    onnx_digest: str
    """SHA-256 of the ONNX file and its data."""
    base_digest: str = ""

    def save(self, engine: Path) -> None:
        """Write it beside an engine."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        engine.with_suffix(FINGERPRINT_SUFFIX).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, engine: Path) -> Self:
        """Read an engine's.

        Raises:
            FailedPreconditionError: There is none, or it is no fingerprint (`ENGINE_UNKNOWN`).
        """
        path = engine.with_suffix(FINGERPRINT_SUFFIX)
        try:
            values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            ranges = {name: tuple(value) for name, value in values["profile"].items()}
            return cls(
                **{
                    **values,
                    "profile": EngineProfile(**ranges),
                    "compute_capabilities": tuple(values["compute_capabilities"]),
                }
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FailedPreconditionError(
                f"{engine.name} has no readable fingerprint: {error}",
                reason="ENGINE_UNKNOWN",
            ) from error

    def check(
        self, *, builder: str, builder_version: str, compute_capability: str, base_digest: str = ""
    ) -> None:
        """Refuse an engine that was not built for what is here.

        Raises:
            FailedPreconditionError: It differs (`ENGINE_MISMATCH`); the message has the command
                that builds one that fits.
        """
        if (builder, builder_version) != (self.builder, self.builder_version):
            problem = (
                f"it was built by {self.builder} {self.builder_version}, "
                f"and {builder} {builder_version} is here"
            )
        elif compute_capability not in self.compute_capabilities:
            built = ", ".join(self.compute_capabilities)
            problem = (
                f"it was built for compute capability {built}, and {compute_capability} is here"
            )
        elif base_digest and self.base_digest and base_digest != self.base_digest:
            problem = "it was built from another base"
        else:
            return
        command = rebuild_command(builder, compute_capability)
        raise FailedPreconditionError(
            f"the engine cannot be used: {problem}. Build it anew: {command}",
            reason="ENGINE_MISMATCH",
            metadata={"command": command},
        )


def rebuild_command(builder: str, compute_capability: str) -> str:
    """Return the command that builds the engines for a GPU."""
    return f"make engine BUILDER={builder} COMPUTE_CAPABILITY={compute_capability}"


def onnx_digest(path: Path) -> str:
    """Return the SHA-256 of an ONNX file with its external data, if it has any."""
    digest = hashlib.sha256()
    for part in (path, path.with_name(path.name + ".data")):
        if part.is_file():
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
