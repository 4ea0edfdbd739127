"""UNets to ONNX: one graph for every adapter, size, batch and prompt length."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from toile.diffusion.banked_unet import BankedUNet

OPSET = 18
MAX_BATCH = 32
"""Most samples in a batch. Diffusers' upsampling takes another path from 64 on."""
OUTPUT_NAME = "prediction"
MODEL_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
"""The inputs beside the bank's; all fp32 but `sample` and `encoder_hidden_states`, which have the
UNet's own type: TensorRT does not concatenate half with float, as the time embedding would."""

PROMPT_TOKENS = 77
BASE_TIME_IDS = 6
"""SDXL's base takes original size, crop and target size; its refiner 5, with a score."""


def example_inputs(
    banked: BankedUNet,
    *,
    batch: int = 2,
    rank: int = 4,
    size: int = 0,
    tokens: int = PROMPT_TOKENS,
    time_ids: int = BASE_TIME_IDS,
) -> dict[str, torch.Tensor]:
    """Return random inputs by name, model's and bank's.

    Args:
        banked: The UNet.
        batch: Samples.
        rank: Rank of the bank's adapters.
        size: Side of the latents; the UNet's own when 0.
        tokens: Length of the prompt.
        time_ids: 6, or 5 for a refiner.
    """
    config = banked.config
    weight = next(banked.parameters())
    like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    side = size or int(config.sample_size)
    # The config has the width of both together only.
    pooled = (
        config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
    )
    inputs = {
        "sample": torch.randn(batch, config.in_channels, side, side, **like),
        "timestep": torch.rand(batch, device=weight.device) * 999,
        "encoder_hidden_states": torch.randn(batch, tokens, config.cross_attention_dim, **like),
        "text_embeds": torch.randn(batch, pooled, device=weight.device),
        "time_ids": torch.full((batch, time_ids), 8.0 * side, device=weight.device),
    }
    for group in banked.layout.groups:
        count = len(group.targets)
        down = torch.randn(batch, count, rank, group.in_features, **like)
        up = torch.randn(batch, count, group.out_features, rank, **like)
        inputs[f"down_{group.name}"] = down / group.in_features**0.5
        inputs[f"up_{group.name}"] = 0.1 * up / rank
    return inputs


def run(banked: BankedUNet, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate with inputs by their exported names: `[B, C, H/8, W/8]`."""
    bank = {name: inputs[name] for name in banked.layout.input_names}
    with torch.inference_mode():
        predicted: torch.Tensor = banked(**{n: inputs[n] for n in MODEL_INPUTS}, bank=bank)
    return predicted


def export_onnx(banked: BankedUNet, path: Path, *, time_ids: int = BASE_TIME_IDS) -> Path:
    """Write the UNet as ONNX; weights of more than 1 GB go to `{name}.data` beside it.

    Batch, rank, height, width and prompt length stay open.

    Args:
        banked: The UNet.
        path: The file; its folder is made when it is not there.
        time_ids: 6, or 5 for a refiner.

    Returns:
        The file.
    """
    banked.eval()
    inputs = example_inputs(banked, time_ids=time_ids)
    batch, rank = torch.export.Dim("batch", max=MAX_BATCH), torch.export.Dim("rank")
    height, width, tokens = (torch.export.Dim.DYNAMIC,) * 3
    shapes: dict[str, Any] = {
        "sample": {0: batch, 2: height, 3: width},
        "timestep": {0: batch},
        "encoder_hidden_states": {0: batch, 1: tokens},
        "text_embeds": {0: batch},
        "time_ids": {0: batch},
        "bank": {
            name: {0: batch, (2 if name.startswith("down_") else 3): rank}
            for name in banked.layout.input_names
        },
    }
    arguments: dict[str, Any] = {name: inputs[name] for name in MODEL_INPUTS}
    arguments["bank"] = {name: inputs[name] for name in banked.layout.input_names}
    with _quiet(), torch.inference_mode(mode=False):
        program = torch.onnx.export(
            banked,
            (),
            kwargs=arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=[*MODEL_INPUTS, *banked.layout.input_names],
            output_names=[OUTPUT_NAME],
            # Without it GEGLU's chunk becomes SplitToSequence, which TensorRT does not parse.
            optimize=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101 - what `dynamo=True` returns
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = sum(tensor.nbytes for tensor in banked.parameters())
    program.save(path, external_data=parameters > 1 << 30)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says of its own inner works."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
