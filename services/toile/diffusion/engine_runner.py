"""Running engines on a GPU, with torch tensors as their buffers.

Source: NVIDIA TensorRT Python API (`IExecutionContext.execute_async_v3`) and, of TensorRT for RTX,
"Working with Runtime Cache".
"""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.diffusion.engines import CACHE_SUFFIX, NEAREST, Fingerprint, check_plan, nearest_size
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.diffusion.tensorrt_library import (
    TENSORRT_RTX,
    capability_here,
    keep_messages,
    load_library,
)

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}


class EngineRunner:
    """An engine, opened. Not for several threads at once: it has one execution context.

    Attributes:
        fingerprint: What it was built from and for.
        input_names: Names that a call needs.
        output_names: Names that it returns.
        dtypes: Types of both, by name.
    """

    def __init__(self, engine: Path, *, base_digest: str = "", device: str = "cuda") -> None:
        """Open an engine file.

        Kernels that TensorRT for RTX compiles on first use are taken from `{name}.cache` beside it
        if `save_cache` left one.

        Args:
            engine: The file, its fingerprint beside it.
            base_digest: Digest of the base in use; not compared when empty.
            device: Where its tensors are.

        Raises:
            FailedPreconditionError: The file is no whole engine (`ENGINE_BROKEN`), has no
                fingerprint (`ENGINE_UNKNOWN`), was built for something else (`ENGINE_MISMATCH`),
                or there is no library (`NO_ENGINE_BUILDER`) or GPU (`NO_GPU`) to run it.
        """
        self.fingerprint = Fingerprint.load(engine)
        check_plan(engine)
        trt = load_library(self.fingerprint.builder)
        self.fingerprint.check(
            builder=self.fingerprint.builder,
            builder_version=str(trt.__version__),
            compute_capability=capability_here(),
            base_digest=base_digest,
        )
        self._device = torch.device(device)
        self._cache_path = engine.with_suffix(CACHE_SUFFIX)
        self._messages = keep_messages(trt)
        self._runtime = trt.Runtime(self._messages)
        with (
            engine.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            why = "; ".join(self._messages.problems[:3])
            raise FailedPreconditionError(
                f"{engine.name} cannot be opened: {why}", reason="ENGINE_BROKEN"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = {n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self.input_names = tuple(name for name in names if name in inputs)
        self.output_names = tuple(name for name in names if name not in inputs)
        self.dtypes = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        self._cache: Any = None
        self._profile = 0
        self._context = self._new_context(trt)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evaluate on torch's current stream, which nothing waits for here.

        Args:
            inputs: By name; brought to the engine's device and types.

        Returns:
            New tensors on the engine's device, by name.

        Raises:
            InvalidArgumentError: An input is missing, or a shape is in none of the engine's
                profiles (`SHAPE_OUT_OF_PROFILE`).
        """
        self._choose_profile(inputs)
        # Freed on the stream that reads them, so torch gives their memory to nobody too early.
        held = {name: self._input(name, inputs) for name in self.input_names}
        outputs = {}
        for name in self.output_names:
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self.dtypes[name], device=self._device)
        for name, tensor in {**held, **outputs}.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(self._stream()):
            why = "; ".join(self._messages.problems[-3:]) or "no reason was given"
            raise RuntimeError(f"the engine failed: {why}")
        return outputs

    def save_cache(self) -> None:
        """Keep the kernels that were compiled so far; TensorRT itself has none to keep."""
        if self._cache is not None:
            self._cache_path.write_bytes(bytes(self._cache.serialize()))

    def _choose_profile(self, inputs: Mapping[str, torch.Tensor]) -> None:
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise InvalidArgumentError(f"the engine needs the input {missing[0]}", field=missing[0])
        shapes = {name: tuple(inputs[name].shape) for name in self.input_names}
        for index, profile in enumerate(self.fingerprint.profiles):
            if profile.takes(shapes):
                if index != self._profile:
                    self._context.set_optimization_profile_async(index, self._stream())
                    self._profile = index
                return
        shown = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:3])
        raise InvalidArgumentError(
            f"this engine was not built for inputs of the shapes {shown}{self._advice(shapes)}",
            field="shape",
            reason="SHAPE_OUT_OF_PROFILE",
        )

    def _advice(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """Name the nearest picture, where its size is what is wrong."""
        latents = next((shapes[name] for name in ("sample", "latents") if name in shapes), None)
        if latents is None:
            return ""
        size = latents[2], latents[3]
        near = nearest_size(self.fingerprint.profiles, *size)
        if near == size:
            return ""
        height, width = (side * PIXELS_PER_LATENT for side in near)
        return f"; {NEAREST}{width}x{height}"

    def _input(self, name: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tensor = inputs[name].to(self._device, self.dtypes[name]).contiguous()
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise InvalidArgumentError(
                f"the engine does not take {name} of the shape {tuple(tensor.shape)}",
                field=name,
                reason="SHAPE_OUT_OF_PROFILE",
            )
        return tensor

    def _new_context(self, trt: Any) -> Any:
        # A profile's memory is there while it is in use.
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self.fingerprint.builder != TENSORRT_RTX:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._cache = config.create_runtime_cache()
        if self._cache_path.is_file() and not self._cache.deserialize(
            self._cache_path.read_bytes()
        ):
            self._cache.reset()  # of another driver or GPU; it is made anew
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _stream(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self._device).cuda_stream)
