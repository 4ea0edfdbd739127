"""What evaluates the UNet in the server: ONNX Runtime, an engine, or a plan that is a model too.

Each keeps adapters where it wants them: ONNX Runtime in the server's memory, the others in the
GPU's, so that a step's adapters do not cross the bus.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from toile.diffusion.bank import (
    BankInputs,
    BankLayout,
    PackedAdapter,
    WeightedAdapters,
    Zeros,
    gather,
)
from toile.diffusion.engines import ENGINE_SUFFIX, Fingerprint
from toile.diffusion.tensorrt_library import capability_here

PLAN_SUFFIX = ".plan"
"""Of the file that names another model of the server, whose engine is called in place."""
HALF_INPUTS = ("sample", "encoder_hidden_states")
"""Inputs that have an engine's precision, as the bank's and ControlNets' maps have; the others are
fp32. See `networks.MODEL_INPUTS`."""

Array = npt.NDArray[Any]


class Evaluator(Protocol):
    """Evaluates batches of a UNet. Not for several threads at once, but for `place`."""

    def place(self, adapter: PackedAdapter) -> PackedAdapter:
        """Bring an adapter to where it is wanted; called from other threads."""
        ...

    def most_samples(self, height: int, width: int) -> int | None:
        """Return how many samples of latents of a size it takes at most; None: any number."""
        ...

    def run(self, inputs: Mapping[str, Array], samples: Sequence[WeightedAdapters]) -> Array:
        """Return the prediction `[B, C, h, w]` in fp32.

        Args:
            inputs: The UNet's by name, without the bank's.
            samples: The adapters of each sample.

        Raises:
            BankError: A sample's ranks add up to more than the engine takes.
        """
        ...

    def close(self) -> None:
        """Keep what the next start can use."""
        ...


def open_evaluator(path: Path, layout: BankLayout, *, max_rank: int, threads: int) -> Evaluator:
    """Open what a file asks for, by its suffix.

    Args:
        path: `.onnx`, `.engine` with its fingerprint beside it, or `PLAN_SUFFIX` likewise.
        layout: Of the bank.
        max_rank: Highest sum of a sample's ranks.
        threads: Of ONNX Runtime; all processors when 0.

    Raises:
        FailedPreconditionError: An engine cannot be run here; see `EngineRunner`.
    """
    if path.suffix == ENGINE_SUFFIX:
        return EngineEvaluator(path, layout, max_rank=max_rank)
    if path.suffix == PLAN_SUFFIX:
        return PlanEvaluator(path, layout, max_rank=max_rank)
    return OnnxEvaluator(path, layout, max_rank=max_rank, threads=threads)


class OnnxEvaluator:
    """ONNX Runtime, on processors."""

    def __init__(self, path: Path, layout: BankLayout, *, max_rank: int, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        # Between two calls its threads would wait busily for milliseconds, on processors that the
        # server and those who draw need then.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._bank = BankInputs(layout, max_rank=max_rank)

    def place(self, adapter: PackedAdapter) -> PackedAdapter:
        """Leave it where it is."""
        return adapter

    def most_samples(self, height: int, width: int) -> None:
        """Any number."""
        del height, width

    def run(self, inputs: Mapping[str, Array], samples: Sequence[WeightedAdapters]) -> Array:
        """See `Evaluator.run`."""
        predicted: Array = self._session.run(None, {**inputs, **self._bank.gather(samples)})[0]
        return predicted

    def close(self) -> None:
        """Nothing is kept."""


class EngineEvaluator:
    """An engine of TensorRT or TensorRT for RTX, in this process."""

    def __init__(
        self, engine: Path, layout: BankLayout, *, max_rank: int, device: str = "cuda"
    ) -> None:
        from toile.diffusion.engine_runner import EngineRunner  # torch, which not each server has

        self._runner = EngineRunner(engine, device=device)
        self._layout, self._max_rank = layout, max_rank
        bank_dtype = self._runner.dtypes[layout.input_names[0]]
        self._place, self._zeros = _tensors(device, bank_dtype)
        self._on_own_stream = _own_stream(device)

    def place(self, adapter: PackedAdapter) -> PackedAdapter:
        """Bring it to the GPU, in the engine's type."""
        return _placed(adapter, self._place)

    def most_samples(self, height: int, width: int) -> int:
        """Of the profiles that take latents of the size."""
        return _most_samples(self._runner.fingerprint, height, width)

    def run(self, inputs: Mapping[str, Array], samples: Sequence[WeightedAdapters]) -> Array:
        """See `Evaluator.run`."""
        import torch

        with self._on_own_stream():
            bank = gather(samples, self._layout, max_rank=self._max_rank, zeros=self._zeros)
            given = {name: torch.from_numpy(array) for name, array in inputs.items()}
            predicted = self._runner({**given, **bank})["prediction"]
            found: Array = predicted.float().cpu().numpy()  # which waits for the stream
        return found

    def close(self) -> None:
        """Keep the kernels that were compiled on the GPU."""
        self._runner.save_cache()


class PlanEvaluator:
    """An engine that the server itself runs as another model, called in place.

    With torch and a GPU in the server's Python, adapters lie in the GPU's memory; without, they
    are sent there with every step.
    """

    def __init__(self, path: Path, layout: BankLayout, *, max_rank: int) -> None:
        import triton_python_backend_utils

        self._utils = triton_python_backend_utils
        self._model = path.read_text(encoding="utf-8").strip()
        self._fingerprint = Fingerprint.load(path)
        self._layout, self._max_rank = layout, max_rank
        dtype = _NUMPY[self._fingerprint.precision]
        self._dtypes = dict.fromkeys((*HALF_INPUTS, *layout.input_names), dtype)
        self._place: Any = lambda array: array.astype(dtype)
        self._zeros: Zeros = lambda shape: np.zeros(shape, dtype)
        if _has_gpu():
            self._fingerprint.check(
                builder=self._fingerprint.builder,  # of what version the server's is, it says
                builder_version=self._fingerprint.builder_version,
                compute_capability=capability_here(),
            )
            self._place, self._zeros = _tensors("cuda", _torch_type(dtype))

    def place(self, adapter: PackedAdapter) -> PackedAdapter:
        """Bring it to the GPU if that can be done here, in the engine's type."""
        return _placed(adapter, self._place)

    def most_samples(self, height: int, width: int) -> int:
        """Of the profiles that take latents of the size."""
        return _most_samples(self._fingerprint, height, width)

    def run(self, inputs: Mapping[str, Array], samples: Sequence[WeightedAdapters]) -> Array:
        """See `Evaluator.run`."""
        bank = gather(samples, self._layout, max_rank=self._max_rank, zeros=self._zeros)
        request = self._utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=["prediction"],
            inputs=[
                *(self._tensor(name, self._typed(name, array)) for name, array in inputs.items()),
                *(self._tensor(name, array) for name, array in bank.items()),
            ],
        )
        if _on_gpu(bank):  # the other model has a stream of its own
            import torch

            torch.cuda.synchronize()
        response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        predicted = self._utils.get_output_tensor_by_name(response, "prediction")
        if not predicted.is_cpu():
            import torch

            return np.asarray(torch.utils.dlpack.from_dlpack(predicted.to_dlpack()).float().cpu())
        found: Array = predicted.as_numpy().astype(np.float32)
        return found

    def close(self) -> None:
        """The engine is the server's."""

    def _typed(self, name: str, array: Array) -> Array:
        kind = np.float32
        if name.startswith("control_image_"):
            kind = self._dtypes["sample"]
        return array.astype(self._dtypes.get(name, kind))

    def _tensor(self, name: str, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            return self._utils.Tensor(name, np.ascontiguousarray(array))
        return self._utils.Tensor.from_dlpack(name, array)


_NUMPY: Mapping[str, Any] = {"fp16": np.float16, "fp32": np.float32}


def _on_gpu(bank: Mapping[str, Any]) -> bool:
    return any(not isinstance(array, np.ndarray) for array in bank.values())


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _torch_type(dtype: Any) -> Any:
    import torch

    return {np.float16: torch.float16, np.float32: torch.float32}[dtype]


def _tensors(device: str, dtype: Any) -> tuple[Any, Zeros]:
    """Return what brings an array to a device, and what makes zeros there."""
    import torch

    def place(array: Any) -> Any:
        return torch.from_numpy(array).to(device, dtype)

    return place, lambda shape: torch.zeros(shape, dtype=dtype, device=device)


def _own_stream(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what has torch use a stream other than the default one.

    TensorRT synchronizes more than it must on the default stream.
    """
    import torch

    if torch.device(device).type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return lambda: torch.cuda.stream(stream)


def _placed(adapter: PackedAdapter, place: Any) -> PackedAdapter:
    return replace(adapter, arrays={name: place(a) for name, a in adapter.arrays.items()})


def _most_samples(fingerprint: Fingerprint, height: int, width: int) -> int:
    """Return the most samples of a size; 1 where there is no profile, and its call will say so."""
    return max(
        (
            profile.batch[2]
            for profile in fingerprint.profiles
            if profile.latent_size[0] <= min(height, width)
            and max(height, width) <= profile.latent_size[2]
        ),
        default=1,
    )
