"""What a build is told and keeps; the library is made up, for TensorRT itself wants a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from toile.diffusion import engine_builders
from toile.diffusion.engine_builders import EngineBuilder
from toile.diffusion.engines import EngineProfile, Fingerprint
from toile.diffusion.tensorrt_library import TENSORRT, TENSORRT_RTX, builder_for

OURS = b"times of this GPU:"


class Logger:
    Severity = SimpleNamespace(ERROR=1)


class Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class Config:
    cache: Cache | None = None

    def create_timing_cache(self, data: bytes) -> Cache:
        return Cache(data)

    def set_timing_cache(self, cache: Cache, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits = not cache.data or cache.data.startswith(OURS)
        if fits:
            self.cache = cache
        return fits

    def add_optimization_profile(self, profile: Any) -> None:
        pass


class Builder:
    def __init__(self, logger: Logger) -> None:
        pass

    def create_network(self, flags: int) -> Any:
        output = SimpleNamespace(dtype=SimpleNamespace(name="HALF"))
        return SimpleNamespace(num_inputs=0, get_output=lambda index: output)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> None:
        return None

    def build_serialized_network(self, network: Any, config: Config) -> Any:
        if config.cache is not None:  # what is known need not be timed
            config.cache.data = (config.cache.data or OURS) + b"."
        return np.frombuffer(b"an engine", np.uint8)


LIBRARY = SimpleNamespace(
    __version__="10.0",
    ILogger=Logger,
    Builder=Builder,
    NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
    OnnxParser=lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True),
    ComputeCapability=SimpleNamespace(__members__={"SM89": 89}),
)


@pytest.fixture
def onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine_builders, "capability_here", lambda: "9.0")
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"a network")
    return path


def build(name: str, onnx: Path, times: Path | None, capability: str) -> Fingerprint:
    library = LIBRARY
    if name == TENSORRT_RTX:
        config = SimpleNamespace(
            set_compute_capability=lambda value, index: None,
            add_optimization_profile=lambda profile: None,
            cache=None,
        )

        class Rtx(Builder):
            def create_builder_config(self) -> Any:
                return config

        library = SimpleNamespace(**{**vars(LIBRARY), "Builder": Rtx})
    built = EngineBuilder(name, library).build(
        onnx,
        onnx.with_suffix(".engine"),
        profiles=[EngineProfile()],
        compute_capabilities=[capability],
        rebuild="again",
        timing_cache=times,
    )
    assert built.path.read_bytes() == b"an engine"
    return Fingerprint.load(built.path)


def test_what_tensorrt_measured_is_taken_for_the_next_engine(onnx: Path, tmp_path: Path) -> None:
    times = tmp_path / "times"
    for kept in (OURS + b".", OURS + b".."):
        assert build(TENSORRT, onnx, times, "9.0").rebuild == "again"
        assert times.read_bytes() == kept
    times.write_bytes(b"times of another GPU")
    build(TENSORRT, onnx, times, "9.0")
    assert times.read_bytes() == OURS + b"."
    build(TENSORRT, onnx, None, "9.0")


def test_tensorrt_for_rtx_measures_nothing(onnx: Path, tmp_path: Path) -> None:
    build(TENSORRT_RTX, onnx, tmp_path / "times", "8.9")
    assert not (tmp_path / "times").exists()


def test_each_gpu_has_its_builder() -> None:
    assert [builder_for(one) for one in ("7.5", "8.9", "12.0")] == [TENSORRT_RTX] * 3
    assert [builder_for(one) for one in ("9.0", "10.0", "10.3")] == [TENSORRT] * 3
