"""Networks to ONNX: one graph for every adapter, size, batch and prompt length."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants

from toile.diffusion.banked_unet import BankedUNet
from toile.diffusion.engines import open_axes
from toile.diffusion.networks import BASE_TIME_IDS, DenoisingNetwork, NamedNetwork, Sizes

OPSET = 18
MAX_BATCH = 32
"""Most samples in a batch. Upsampling in diffusers' VAE takes another path from 64 on."""
TRACED_SIZES = Sizes(latent_size=17)
"""Of latents whose sides nothing divides diffusers' UNets upsample to the size of what they skipped
to, which is right for every size; of others they double the size, which is right for those alone.
"""
EXTERNAL_BYTES = 1 << 30
"""Weights of more go to a file of their own; a protocol buffer ends at 2 GB."""


def export_onnx(banked: BankedUNet, path: Path, *, time_ids: int = BASE_TIME_IDS) -> Path:
    """Write a UNet as ONNX; see `write_onnx`.

    Args:
        banked: The UNet.
        path: The file.
        time_ids: 6, or 5 for a refiner.
    """
    return write_onnx(DenoisingNetwork(banked, time_ids), path)


def write_onnx(network: NamedNetwork, path: Path) -> Path:
    """Write a network as ONNX; weights of more than 1 GB go to `{name}.data` beside it.

    The axes of `open_axes` stay open. The weights' type is the file's.

    Args:
        network: What to export.
        path: The file; its folder is made when it is not there.

    Returns:
        The file.
    """
    network.eval()
    inputs = network.example_inputs(TRACED_SIZES)
    with _quiet(), torch.inference_mode(mode=False):
        program = torch.onnx.export(
            network,
            (),
            kwargs={"inputs": inputs},
            dynamo=True,
            dynamic_shapes={"inputs": {name: _open(name) for name in inputs}},
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(network.output_names),
            optimize=False,
            verbose=False,
        )
    assert program is not None  # noqa: S101 - what `dynamo=True` returns
    _simplify(program.model)
    _forget_origin(program.model.graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    weight_bytes = sum(tensor.nbytes for tensor in network.parameters())
    program.save(path, external_data=weight_bytes > EXTERNAL_BYTES)
    return path


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants and infer types and shapes.

    Without it GEGLU's chunk stays SplitToSequence, and constants CastLike, which TensorRT does not
    parse. The exporter's own `optimize=True` does the same and rewrites patterns besides, one of
    them (`SlicesSplit`) in time that grows with the square of the nodes; this takes 3 s for the
    17,706 nodes of SDXL's UNet. Engines and ONNX Runtime rewrite for themselves.
    """
    passes.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True)
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        simplify(model)


def _forget_origin(graph: Any) -> None:
    """Drop the exporter's notes, stack traces with this machine's paths among them.

    The same network then gives the same file, and digest, on every machine.
    """
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _open(name: str) -> dict[int, Any]:
    dims: dict[str, Any] = {
        "batch": torch.export.Dim("batch", max=MAX_BATCH),
        "rank": torch.export.Dim("rank"),
    }
    return {
        axis: dims.get(what, torch.export.Dim.DYNAMIC) for axis, what in open_axes(name).items()
    }


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
