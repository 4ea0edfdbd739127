"""Builders of engines: TensorRT for RTX, which needs no GPU to build, and TensorRT itself.

The first compiles ahead of time for named compute capabilities, 7.5 to 8.9 and 12.x; the second for
the GPU of the machine, Hopper and data-centre Blackwell included. Source: NVIDIA TensorRT for RTX
documentation, "Ahead-of-time compilation", and the TensorRT Python API.

TensorRT times kernels while it builds, and keeps the times for the next build on the same GPU.
TensorRT for RTX does not (its calls do nothing since 1.2); what it keeps is made on the GPU, when
an engine runs: see `engine_runner`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toile.core.errors import InvalidArgumentError
from toile.diffusion.engines import EngineProfile, Fingerprint, onnx_digest
from toile.diffusion.tensorrt_library import TENSORRT, capability_here, keep_messages, load_library

_PRECISIONS = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk, and what making it cost."""

    path: Path
    fingerprint: Fingerprint
    size_bytes: int
    seconds: float


def open_builder(name: str) -> "EngineBuilder":
    """Return the builder of a name.

    Raises:
        InvalidArgumentError: There is no such builder.
        FailedPreconditionError: Its library is not installed (`NO_ENGINE_BUILDER`).
    """
    return EngineBuilder(name, load_library(name))


class EngineBuilder:
    """Compiles ONNX to engines with one of the two libraries; `open_builder` makes it.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
        version: Of the library.
    """

    def __init__(self, name: str, library: Any) -> None:
        self.name = name
        self.version = str(library.__version__)
        self._trt = library
        self._messages = keep_messages(library)

    def build(
        self,
        onnx: Path,
        engine: Path,
        *,
        profiles: Sequence[EngineProfile],
        compute_capabilities: Sequence[str] = (),
        base_digest: str = "",
        rebuild: str = "",
        timing_cache: Path | None = None,
    ) -> BuiltEngine:
        """Compile a network and write the engine with its fingerprint.

        Args:
            onnx: From `export_onnx`; its types are the engine's precision.
            engine: Where to; appears when it is whole.
            profiles: Shapes it takes.
            compute_capabilities: GPUs it is for, such as `8.6`.
            base_digest: Digest of the base that the network comes from.
            rebuild: Command that does all this again, as `Fingerprint.rebuild` has it.
            timing_cache: File that TensorRT's times are taken from and kept in; of its version and
                the GPU, or it is made anew. TensorRT for RTX does not look at it.

        Raises:
            InvalidArgumentError: The network cannot be compiled (`BAD_NETWORK`), or a compute
                capability not be built for (`BAD_COMPUTE_CAPABILITY`).
        """
        started = time.monotonic()
        self._messages.problems.clear()
        builder = self._trt.Builder(self._messages)
        # The parser holds what the network points into, so it must live as long.
        network, parser = self._parse(builder, onnx)
        config = builder.create_builder_config()
        capabilities = self._target(config, compute_capabilities)
        for profile in profiles:
            shapes = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                shapes.set_shape(tensor.name, *profile.shapes(tensor.name, tuple(tensor.shape)))
            config.add_optimization_profile(shapes)
        times = self._open_times(config, timing_cache)
        serialized = builder.build_serialized_network(network, config)
        del parser
        if serialized is None:
            raise self._refused("does not compile", onnx)
        engine.parent.mkdir(parents=True, exist_ok=True)
        partial = engine.with_name(engine.name + ".part")
        try:
            partial.write_bytes(serialized)
            fingerprint = Fingerprint(
                builder=self.name,
                builder_version=self.version,
                compute_capabilities=capabilities,
                profiles=tuple(profiles),
                onnx_digest=onnx_digest(onnx),
                base_digest=base_digest,
                precision=_PRECISIONS.get(network.get_output(0).dtype.name, ""),
                rebuild=rebuild,
            )
            fingerprint.save(engine)
            partial.replace(engine)
        finally:
            partial.unlink(missing_ok=True)
        if times is not None and timing_cache is not None:
            timing_cache.write_bytes(bytes(times.serialize()))
        return BuiltEngine(engine, fingerprint, int(serialized.nbytes), time.monotonic() - started)

    def _open_times(self, config: Any, path: Path | None) -> Any:
        """Give a build the times of earlier ones; None where there is nothing to keep."""
        if path is None or self.name != TENSORRT:
            return None
        times = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(times, ignore_mismatch=False):
            times = config.create_timing_cache(b"")  # of another version or GPU
            config.set_timing_cache(times, ignore_mismatch=False)
        return times

    def _parse(self, builder: Any, onnx: Path) -> tuple[Any, Any]:
        trt = self._trt
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(typed)
        parser = trt.OnnxParser(network, self._messages)
        if not parser.parse_from_file(str(onnx)):
            self._messages.problems.extend(
                parser.get_error(index).desc() for index in range(parser.num_errors)
            )
            raise self._refused("is not parsed", onnx)
        return network, parser

    def _target(self, config: Any, wanted: Sequence[str]) -> tuple[str, ...]:
        """Set what is built for, and return it."""
        if self.name == TENSORRT:
            here = capability_here()
            if set(wanted) - {here}:
                raise self._bad_capability(wanted[0], [here])
            return (here,)
        known = {
            f"{int(value) // 10}.{int(value) % 10}": value
            for name, value in self._trt.ComputeCapability.__members__.items()
            if name.startswith("SM")
        }
        if not wanted:
            raise self._bad_capability("none", known)
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            if capability not in known:
                raise self._bad_capability(capability, known)
            config.set_compute_capability(known[capability], index)
        return tuple(wanted)

    def _bad_capability(self, wanted: str, known: Any) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{self.name} cannot build for compute capability {wanted}; it can for "
            + ", ".join(sorted(known, key=lambda text: [int(p) for p in text.split(".")])),
            field="compute_capability",
            reason="BAD_COMPUTE_CAPABILITY",
        )

    def _refused(self, what: str, onnx: Path) -> InvalidArgumentError:
        why = "; ".join(self._messages.problems[:3]) or "no reason was given"
        return InvalidArgumentError(
            f"{onnx.name} {what} by {self.name}: {why}", field="onnx", reason="BAD_NETWORK"
        )
