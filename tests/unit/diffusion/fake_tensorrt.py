"""A library with TensorRT's interface whose engines are ONNX files run by ONNX Runtime.

It takes the addresses and shapes that the real one takes, on the CPU, so that `EngineRunner` is
tested where there is no GPU.
"""

import ctypes
import enum
import math
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

from toile.diffusion.engines import Fingerprint

__version__ = "1.7.1"
HEADER_BYTES = 24
_NUMPY = {"tensor(float)": ("FLOAT", np.float32), "tensor(int64)": ("INT64", np.int64)}


class Builder:
    pass


class ILogger:
    class Severity(enum.IntEnum):
        ERROR = 1


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    ON_PROFILE_CHANGE = 1


class _Cache:
    def __init__(self) -> None:
        self.kernels = b""

    def serialize(self) -> bytes:
        return self.kernels

    def deserialize(self, data: bytes) -> bool:
        self.kernels = data
        return data == b"kernels"

    def reset(self) -> None:
        self.kernels = b""


class _RuntimeConfig:
    cache: _Cache | None = None

    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy

    def set_runtime_cache(self, cache: _Cache) -> None:
        self.cache = cache


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
        try:
            return Engine(plan[HEADER_BYTES:])
        except InvalidProtobuf as error:
            self._logger.log(ILogger.Severity.ERROR, str(error))
            return None


class Engine:
    def __init__(self, onnx: bytes) -> None:
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.nodes = self.inputs | {node.name: node for node in self.session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.nodes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.nodes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> enum.Enum:
        return enum.Enum("DataType", [_NUMPY[self.nodes[name].type][0]])(1)

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(self, config: _RuntimeConfig) -> "Context":
        return Context(self, config)


class Context:
    MOST_BATCH = 4

    def __init__(self, engine: Engine, config: _RuntimeConfig) -> None:
        self._engine, self._cache = engine, config.cache
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.profile = 0
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return shape[0] <= self.MOST_BATCH

    def get_tensor_shape(self, name: str) -> list[int]:
        symbols = {
            symbol: size
            for given, shape in self._shapes.items()
            for symbol, size in zip(self._engine.inputs[given].shape, shape, strict=True)
            if isinstance(symbol, str)
        }
        # An output's sizes are written as sums of the inputs'.
        return [eval(str(d), {}, symbols) for d in self._engine.nodes[name].shape]  # noqa: S307

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        inputs = {name: self._view(name) for name in self._engine.inputs}
        values = self._engine.session.run(None, inputs)
        for node, value in zip(self._engine.session.get_outputs(), values, strict=True):
            self._view(node.name)[...] = value
        self._cache.kernels = b"kernels"
        return True

    def _view(self, name: str) -> np.ndarray:
        dtype = np.dtype(_NUMPY[self._engine.nodes[name].type][1])
        shape = self.get_tensor_shape(name)
        size = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


def write_engine(onnx: Path, engine: Path, fingerprint: Fingerprint) -> None:
    """Make an engine of an ONNX file."""
    size = HEADER_BYTES + onnx.stat().st_size
    header = b"vtrt".ljust(16, b"\0") + size.to_bytes(8, "little")
    engine.write_bytes(header + onnx.read_bytes())
    fingerprint.save(engine)
