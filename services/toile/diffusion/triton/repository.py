"""The Triton model repository of a base: written from an exported UNet, then read by the server."""

import importlib.resources
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toile.core.errors import FailedPreconditionError
from toile.diffusion.bank import MAX_RANK, BankLayout
from toile.diffusion.engines import ENGINE_SUFFIX, Fingerprint
from toile.diffusion.tensorrt_library import TENSORRT
from toile.diffusion.triton.evaluators import HALF_INPUTS, PLAN_SUFFIX

VERSION = "1"
_PLAN_TYPES = {"fp16": "FP16", "fp32": "FP32"}


@dataclass(frozen=True)
class FrontConfig:
    """How a front batches and what it holds."""

    max_batch: int = 16
    """Samples in one engine call; classifier-free guidance makes two of an image."""
    queue_delay_microseconds: int = 0
    """How long an idle engine waits for others after a first request; a busy one collects them."""
    batch_pixels: int = 8 * 128 * 128
    """Latent pixels in one engine call: 8 samples of 1024 x 1024 pixels, 2 of 2048 x 2048. More of
    1024 pixels would add 2 % to what a modelled A100 draws (`benchmarks/README.md`)."""
    bank_bytes: int = 2 << 30
    """Memory for adapters; the least recently used leave."""
    max_rank: int = MAX_RANK
    """Highest sum of the ranks of a sample's adapters."""
    threads: int = 0
    """Of ONNX Runtime; as many as the server has processors when 0."""


SERVER_MODULES = (
    "__init__.py",
    "core/__init__.py",
    "core/errors.py",
    "diffusion/__init__.py",
    "diffusion/bank.py",
    "diffusion/engine_runner.py",
    "diffusion/engines.py",
    "diffusion/sdxl.py",
    "diffusion/tensorrt_library.py",
    "diffusion/triton/__init__.py",
    "diffusion/triton/evaluators.py",
    "diffusion/triton/resident.py",
)
"""What of this package the front needs: copied to where it imports it from."""


def write_model(
    repository: Path,
    name: str,
    *,
    engine: Path,
    layout: BankLayout,
    unet_config: Any,
    time_ids: int,
    pooled_width: int,
    controls: int = 0,
    config: FrontConfig | None = None,
) -> tuple[str, ...]:
    """Write a UNet's front, and what it calls if that is a model too; return the models' names.

    The front of an ONNX file, or of an engine of TensorRT for RTX, runs it itself. An engine of
    TensorRT proper is run by the server's own backend, as `{name}-plan`. They are to be loaded in
    the order of the names.

    Args:
        repository: The repository's folder.
        name: Of the front.
        engine: From `export_onnx`, in fp32, with its data beside it; or an engine with its
            fingerprint.
        layout: Of its bank.
        unet_config: The UNet's config, for the widths of its inputs.
        time_ids: 6, or 5 for a refiner.
        pooled_width: Width of the pooled text.
        controls: ControlNets in the graph; each is shown a map as bytes, so that it costs the wire
            a quarter of what the graph takes.
        config: How it batches.

    Raises:
        FailedPreconditionError: An engine has no fingerprint (`ENGINE_UNKNOWN`), or TensorRT's is
            in a precision that NumPy has no type for (`PRECISION_NOT_SERVED`).
    """
    config = config or FrontConfig()
    version = repository / name / VERSION
    version.mkdir(parents=True, exist_ok=True)
    _copy_code(version)
    (version / "layout.json").write_text(layout.to_json() + "\n", encoding="utf-8")
    inputs: dict[str, list[int]] = {
        "sample": [unet_config["in_channels"], -1, -1],
        "timestep": [1],
        "encoder_hidden_states": [-1, unet_config["cross_attention_dim"]],
        "text_embeds": [pooled_width],
        "time_ids": [time_ids],
    }
    for index in range(controls):
        inputs |= {f"control_image_{index}": [3, -1, -1], f"control_scale_{index}": [1]}
    channels = unet_config["out_channels"]
    names: tuple[str, ...] = (name,)
    fingerprint = Fingerprint.load(engine) if engine.suffix == ENGINE_SUFFIX else None
    if fingerprint is not None and fingerprint.builder == TENSORRT:
        plan = f"{name}-plan"
        _write_plan(repository / plan, engine, fingerprint, layout, inputs, channels)
        file = f"unet{PLAN_SUFFIX}"
        (version / file).write_text(plan + "\n", encoding="utf-8")
        fingerprint.save(version / file)
        names = (plan, name)
    else:
        file = f"unet{engine.suffix}"
        shutil.copyfile(engine, version / file)
        if fingerprint is not None:
            fingerprint.save(version / file)
        data = engine.with_name(engine.name + ".data")
        if data.is_file():  # the graph names it, so it keeps its name
            shutil.copyfile(data, version / data.name)
    parameters = {
        "engine": file,
        "batch_pixels": config.batch_pixels,
        "bank_bytes": config.bank_bytes,
        "max_rank": config.max_rank,
        "threads": config.threads,
    }
    text = _CONFIG.format(
        name=name,
        max_batch=config.max_batch,
        delay=config.queue_delay_microseconds,
        inputs=",\n".join(
            _tensor(key, "UINT8" if key.startswith("control_image_") else "FP32", dims)
            for key, dims in inputs.items()
        ),
        channels=channels,
        parameters="\n".join(
            f'parameters: {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
    )
    (repository / name / "config.pbtxt").write_text(text, encoding="utf-8")
    return names


def _copy_code(version: Path) -> None:
    package = importlib.resources.files("toile")
    for path in SERVER_MODULES:
        copy = version / "toile" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((package / path).read_text(encoding="utf-8"), encoding="utf-8")
    front = package / "diffusion" / "triton" / "front.py"
    (version / "model.py").write_text(front.read_text(encoding="utf-8"), encoding="utf-8")


def _write_plan(
    folder: Path,
    engine: Path,
    fingerprint: Fingerprint,
    layout: BankLayout,
    inputs: Mapping[str, list[int]],
    channels: int,
) -> None:
    """Write the model of an engine that the server's TensorRT backend runs."""
    (folder / VERSION).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(engine, folder / VERSION / "model.plan")
    kind = _PLAN_TYPES.get(fingerprint.precision)
    if kind is None:
        raise FailedPreconditionError(
            f"a plan in {fingerprint.precision or 'no known precision'} cannot be called in place; "
            f"one in {' or '.join(_PLAN_TYPES)} can",
            reason="PRECISION_NOT_SERVED",
        )
    tensors = []
    for name, dims in inputs.items():
        scalar = name == "timestep" or name.startswith("control_scale_")
        own = name in HALF_INPUTS or name.startswith("control_image_")
        tensors.append(_tensor(name, kind if own else "FP32", [-1] if scalar else [-1, *dims]))
    for group in layout.groups:
        count = len(group.targets)
        tensors += [
            _tensor(f"down_{group.name}", kind, [-1, count, -1, group.in_features]),
            _tensor(f"up_{group.name}", kind, [-1, count, group.out_features, -1]),
        ]
    profiles = ", ".join(f'"{index}"' for index in range(len(fingerprint.profiles)))
    text = _PLAN_CONFIG.format(
        name=folder.name,
        inputs=",\n".join(tensors),
        output=_tensor("prediction", kind, [-1, channels, -1, -1]),
        profiles=profiles,
    )
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")


def _tensor(name: str, kind: str, dims: list[int]) -> str:
    return f'  {{ name: "{name}" data_type: TYPE_{kind} dims: {dims} }}'


_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [
{inputs},
  {{ name: "adapters" data_type: TYPE_STRING dims: [1] }}
]
output [
  {{ name: "prediction" data_type: TYPE_FP32 dims: [{channels}, -1, -1] }},
  {{ name: "request" data_type: TYPE_INT64 dims: [1] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
{parameters}
"""

_PLAN_CONFIG = """\
name: "{name}"
platform: "tensorrt_plan"
max_batch_size: 0
input [
{inputs}
]
output [
{output}
]
instance_group [ {{ count: 1 kind: KIND_GPU profile: [ {profiles} ] }} ]
"""
