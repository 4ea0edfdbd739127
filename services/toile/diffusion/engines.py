"""Compiled engines: what they were built from and for, and whether they may be used here.

Free of TensorRT, which `engine_builders` and `engine_runner` alone touch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from toile.core.errors import FailedPreconditionError
from toile.diffusion.sdxl import PIXELS_PER_LATENT

ENGINE_SUFFIX, FINGERPRINT_SUFFIX = ".engine", ".json"
CACHE_SUFFIX = ".cache"
"""Of the kernels that were compiled on a GPU for an engine, beside it."""
ENCODED_CHUNK = 77
"""Tokens of an encoded prompt come in whole chunks of so many."""
LEAST_LATENT_SIZE = 8
TUNED_RANK = 16
"""Of one LoRA, as most are trained; an engine is at its best there."""

BUILDER, CAPABILITY = "{builder}", "{compute_capability}"
"""What stands in `Fingerprint.rebuild` for a builder and for the GPU's compute capability."""

NEAREST = "the nearest size that works is "
"""Ends the message of an engine that does not take a picture's size, before width x height."""

Range = tuple[int, int, int]
"""Least, what it is tuned for, most."""


def open_axes(name: str) -> dict[int, str]:
    """Return which axes of a network's input stay open, and what each counts.

    Args:
        name: Of the input, as in `toile.diffusion.networks`.

    Returns:
        By axis: `batch`, `rank`, `tokens`, `latent_size`, or `picture_size`, which is
        `PIXELS_PER_LATENT` times that.
    """
    if name in ("sample", "latents"):
        return {0: "batch", 2: "latent_size", 3: "latent_size"}
    if name.startswith("control_image_"):
        return {0: "batch", 2: "picture_size", 3: "picture_size"}
    if name == "encoder_hidden_states":
        return {0: "batch", 1: "tokens"}
    if name.startswith("down_"):
        return {0: "batch", 2: "rank"}
    if name.startswith("up_"):
        return {0: "batch", 3: "rank"}
    return {0: "batch"}


@dataclass(frozen=True)
class EngineProfile:
    """Shapes that an engine takes: all within them. An engine may have several profiles."""

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
        axes = open_axes(name)
        return tuple(
            tuple(
                size if size >= 0 else self._range(axes[axis])[which]
                for axis, size in enumerate(shape)
            )
            for which in range(3)
        )

    def takes(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Say whether inputs of these shapes, by name, are within the profile."""
        for name, shape in shapes.items():
            for axis, counts in open_axes(name).items():
                least, _, most = self._range(counts)
                if not least <= shape[axis] <= most:
                    return False
        return True

    def _range(self, counts: str) -> Range:
        if counts == "picture_size":
            least, tuned, most = (size * PIXELS_PER_LATENT for size in self.latent_size)
            return least, tuned, most
        found: Range = getattr(self, counts)
        return found


def nearest_size(profiles: Sequence[EngineProfile], height: int, width: int) -> tuple[int, int]:
    """Return the nearest height and width of latents that a profile takes."""

    def distance(size: tuple[int, int]) -> int:
        return abs(size[0] - height) + abs(size[1] - width)

    taken = [profile.latent_size for profile in profiles]
    sizes = [
        (min(max(height, least), most), min(max(width, least), most)) for least, _, most in taken
    ]
    return min(sizes, key=distance)


def serving_profiles(
    *,
    native_size: int,
    largest_size: int,
    batch: int,
    batch_pixels: int,
    rank: int,
    tokens: int = 8 * ENCODED_CHUNK,
) -> tuple[EngineProfile, ...]:
    """Return the profiles of an engine that serves pictures of all sizes up to the largest.

    An engine has memory for the most that a profile allows, and a batch of small pictures may be
    larger than one of large ones. So there is a profile for each cap of a batch, among the sides
    that are the native one, its halves and its doubles: it takes all up to the longest of that cap.

    Args:
        native_size: Side of the latents that the base was trained for.
        largest_size: Longest side of the latents that are asked for.
        batch: Most samples of a batch.
        batch_pixels: Most latent pixels of a batch.
        rank: Highest sum of the ranks of a sample's adapters.
        tokens: Most tokens of an encoded prompt.
    """

    def cap(side: int) -> int:
        return max(2, min(batch, batch_pixels // side**2))

    side = min(native_size, largest_size)
    while cap(side) < batch and side > LEAST_LATENT_SIZE:
        side //= 2
    longest: dict[int, int] = {}  # by cap
    while side < largest_size:
        longest[cap(side)] = side
        side *= 2
    longest[cap(largest_size)] = largest_size
    profiles, shorter = [], 0
    for many, most in longest.items():
        profiles.append(
            EngineProfile(
                batch=(1, 2, many),
                rank=(1, min(TUNED_RANK, rank), rank),
                latent_size=(
                    LEAST_LATENT_SIZE,
                    native_size if shorter < native_size <= most else most,
                    most,
                ),
                tokens=(ENCODED_CHUNK, ENCODED_CHUNK, tokens),
            )
        )
        shorter = most
    return tuple(profiles)


@dataclass(frozen=True)
class Fingerprint:
    """What an engine was built from, by what, and for which GPUs; a JSON file beside it."""

    builder: str
    """`tensorrt` or `tensorrt-rtx`."""
    builder_version: str
    """An engine runs with the very version that built it."""
    compute_capabilities: tuple[str, ...]
    """GPUs it runs on, such as `8.6`."""
    profiles: tuple[EngineProfile, ...]
    """In the engine's order."""
    onnx_digest: str
    """SHA-256 of the ONNX file and its data."""
    base_digest: str = ""
    precision: str = ""
    """Of what it computes and gives: `fp16`, `bf16` or `fp32`."""
    rebuild: str = ""
    """Command that builds it again, with `BUILDER` and `CAPABILITY` in place of what to build with
    and for."""

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
            profiles = tuple(
                EngineProfile(**{name: tuple(value) for name, value in profile.items()})
                for profile in values["profiles"]
            )
            return cls(
                **{
                    **values,
                    "profiles": profiles,
                    "compute_capabilities": tuple(values["compute_capabilities"]),
                }
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
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
        command = self.rebuild.replace(BUILDER, builder).replace(CAPABILITY, compute_capability)
        raise FailedPreconditionError(
            f"the engine cannot be used: {problem}."
            + (f" Build it anew: {command}" if command else ""),
            reason="ENGINE_MISMATCH",
            metadata={"command": command},
        )


def check_plan(engine: Path) -> None:
    """Refuse a file that is no engine, or not a whole one; needs no library and no GPU.

    A plan of TensorRT or TensorRT for RTX has `trt` from its second byte, and its own size in the
    eight bytes from the sixteenth (as written by 1.7; the layout is not documented).

    Raises:
        FailedPreconditionError: It is not (`ENGINE_BROKEN`).
    """
    try:
        size = engine.stat().st_size
        with engine.open("rb") as file:
            header = file.read(24)
    except OSError as error:
        raise _broken(engine, f"cannot be read: {error}") from error
    if len(header) < 24 or header[1:4] != b"trt":
        raise _broken(engine, "is no engine")
    if (stated := int.from_bytes(header[16:24], "little")) != size:
        raise _broken(engine, f"has {size} bytes, and says that it has {stated}")


def _broken(engine: Path, what: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"{engine.name} {what}", reason="ENGINE_BROKEN")


def onnx_digest(path: Path) -> str:
    """Return the SHA-256 of an ONNX file with its external data, if it has any."""
    digest = hashlib.sha256()
    for part in (path, path.with_name(path.name + ".data")):
        if part.is_file():
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
