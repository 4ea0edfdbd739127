"""The Triton model repository of a base: written from an exported UNet, then read by the server."""

import importlib.resources
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toile.diffusion import bank
from toile.diffusion.bank import MAX_RANK, BankLayout

VERSION = "1"
ENGINE_FILE = "unet.onnx"


@dataclass(frozen=True)
class FrontConfig:
    """How a front batches and what it holds."""

    max_batch: int = 16
    """Samples in one engine call; classifier-free guidance makes two of an image."""
    queue_delay_microseconds: int = 0
    """How long an idle engine waits for others after a first request; a busy one collects them."""
    batch_pixels: int = 16 * 128 * 128
    """Latent pixels in one engine call: 16 samples of 1024 x 1024 pixels, 4 of 2048 x 2048."""
    bank_bytes: int = 512 << 20
    max_rank: int = MAX_RANK
    threads: int = 0
    """Of ONNX Runtime; as many as the server has processors when 0."""


def write_model(
    repository: Path,
    name: str,
    *,
    onnx: Path,
    layout: BankLayout,
    unet_config: Any,
    time_ids: int,
    pooled_width: int,
    controls: int = 0,
    config: FrontConfig | None = None,
) -> Path:
    """Write one model and return its folder.

    Args:
        repository: The repository's folder.
        name: Of the model.
        onnx: From `export_onnx`, in fp32; its data beside it is taken along.
        layout: Of its bank.
        unet_config: The UNet's config, for the widths of its inputs.
        time_ids: 6, or 5 for a refiner.
        pooled_width: Width of the pooled text.
        controls: ControlNets in the graph; each is shown a map as bytes, so that it costs the wire
            a quarter of what the graph takes.
        config: How it batches.
    """
    config = config or FrontConfig()
    folder = repository / name
    version = folder / VERSION
    version.mkdir(parents=True, exist_ok=True)
    front = importlib.resources.files("toile.diffusion.triton") / "front.py"
    (version / "model.py").write_text(front.read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copyfile(str(bank.__file__), version / "bank.py")
    shutil.copyfile(onnx, version / ENGINE_FILE)
    data = onnx.with_name(onnx.name + ".data")
    if data.is_file():  # the graph names it, so it keeps its name
        shutil.copyfile(data, version / data.name)
    (version / "layout.json").write_text(layout.to_json() + "\n", encoding="utf-8")
    inputs = {
        "sample": [unet_config["in_channels"], -1, -1],
        "timestep": [1],
        "encoder_hidden_states": [-1, unet_config["cross_attention_dim"]],
        "text_embeds": [pooled_width],
        "time_ids": [time_ids],
    }
    kinds = dict.fromkeys(inputs, "FP32")
    for index in range(controls):
        inputs |= {f"control_image_{index}": [3, -1, -1], f"control_scale_{index}": [1]}
        kinds |= {f"control_image_{index}": "UINT8", f"control_scale_{index}": "FP32"}
    (folder / "config.pbtxt").write_text(
        _CONFIG.format(
            name=name,
            max_batch=config.max_batch,
            delay=config.queue_delay_microseconds,
            inputs=",\n".join(
                f'  {{ name: "{key}" data_type: TYPE_{kinds[key]} dims: {dims} }}'
                for key, dims in inputs.items()
            ),
            channels=unet_config["out_channels"],
            parameters="\n".join(
                f'parameters: {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
                for key, value in {
                    "engine": ENGINE_FILE,
                    "batch_pixels": config.batch_pixels,
                    "bank_bytes": config.bank_bytes,
                    "max_rank": config.max_rank,
                    "threads": config.threads,
                }.items()
            ),
        ),
        encoding="utf-8",
    )
    return folder


_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [
{inputs},
  {{ name: "adapters" data_type: TYPE_STRING dims: [1] }}
]
output [ {{ name: "prediction" data_type: TYPE_FP32 dims: [{channels}, -1, -1] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
{parameters}
"""
