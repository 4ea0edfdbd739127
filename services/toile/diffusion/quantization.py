"""UNets in FP8: ONNX files whose large products are of 8-bit floats, for Ada and Blackwell GPUs.

Weights and activations of Linears and convolutions are E4M3 with one scale a tensor: the largest
magnitude seen, over E4M3's largest. They are written as QuantizeLinear and DequantizeLinear before
the operators (Micikevicius et al., "FP8 Formats for Deep Learning", 2022; TensorRT documentation,
"Explicit quantization"). What adapters add stays in the file's precision: its weights are inputs,
another style's at the next call. So do the first and the last convolution, whose few channels
matter most and cost least, and the layers that the timestep and the picture's size go through.

Activations are measured on the network's own inputs in real drawings, at all their timesteps.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from toile.diffusion.bank import BankLayout, gather
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.export import EXTERNAL_BYTES
from toile.diffusion.pipelines import DiffusionRequest, diffuse

Sample = Mapping[str, npt.NDArray[Any]]
"""Inputs of one evaluation, by name."""

FP8 = "fp8"
"""The name of this precision; everything that is not quantized is in fp16."""
LARGEST_E4M3 = 448.0
LEAST_CHANNELS = 16
"""Convolutions from or to fewer stay as they are."""
OPSET = 19
"""The first whose QuantizeLinear knows E4M3; it takes all that 18 does as it is."""
CALIBRATION_STEPS = 6
CALIBRATION_PROMPTS = (
    "",
    "a red dress on a white background",
    "a close photograph of woven wool, a herringbone of grey and brown",
    "an ornate pattern of leaves and flowers, gold on deep blue, seamless",
)
"""Of drawings that stand for what will be drawn, where a caller names no others."""
_ZERO = "e4m3_zero"
_STORED, _SCALE, _AFTER = "_e4m3", "_e4m3_scale", "_from_e4m3"


def record(bundle: Bundle, requests: Sequence[DiffusionRequest]) -> list[Sample]:
    """Draw, and return the inputs of each call of the UNet without those of a bank, in fp32."""
    samples: list[Sample] = []

    def keep(_module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        sample, timestep = arguments
        inputs = {
            "sample": sample,
            "timestep": torch.as_tensor(timestep).reshape(-1).expand(len(sample)),
            "encoder_hidden_states": keywords["encoder_hidden_states"],
            **keywords["added_cond_kwargs"],
        }
        samples.append({name: tensor.float().cpu().numpy() for name, tensor in inputs.items()})

    handle = bundle.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for request in requests:
            for _ in diffuse(bundle, TorchDenoiser(bundle, bfloat16=False), request):
                pass
    finally:
        handle.remove()
    return samples


def calibration(
    bundle: Bundle, prompts: Sequence[str] = CALIBRATION_PROMPTS, steps: int = CALIBRATION_STEPS
) -> list[Sample]:
    """Record one drawing of each prompt, at the base's native size."""
    requests = [
        DiffusionRequest(prompt, [seed], steps=steps) for seed, prompt in enumerate(prompts)
    ]
    return record(bundle, requests)


def quantize_fp8(path: Path, out: Path, layout: BankLayout, samples: Sequence[Sample]) -> Path:
    """Write an FP8 copy of a UNet's ONNX file; inputs and outputs keep their types.

    Args:
        path: From `export_onnx`.
        out: The file; weights of more than 1 GB go to `{name}.data` beside it.
        layout: Of its bank, which stays empty while activations are measured.
        samples: From `record`.

    Returns:
        `out`.
    """
    import onnx  # heavy, and not in every installation

    model = onnx.load(str(path))
    nodes = quantized_nodes(model.graph)
    largest = _largest(path, {node.input[0] for node in nodes}, layout, samples)
    _rewrite(model.graph, nodes, largest)
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, OPSET)
    out.parent.mkdir(parents=True, exist_ok=True)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_BYTES:
        data = out.name + ".data"
        onnx.save(model, str(out), save_as_external_data=True, location=data)
    else:
        onnx.save(model, str(out))
    return out


def quantized_nodes(graph: Any) -> list[Any]:
    """Return a graph's Linears of tokens and convolutions of features.

    Linears of one vector a sample, which timesteps go through, are Gemm and not among them.
    """
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    return [
        node
        for node in graph.node
        if node.op_type in ("MatMul", "Conv")
        and node.input[1] in sizes
        and min(sizes[node.input[1]][:2]) >= LEAST_CHANNELS
    ]


def _largest(
    path: Path, names: set[str], layout: BankLayout, samples: Sequence[Sample]
) -> dict[str, float]:
    """Return the largest magnitude of values of a graph, by name, over all samples."""
    import onnx
    import onnxruntime

    helper = onnx.helper
    model = onnx.load(str(path), load_external_data=False)  # found beside the copy that is run
    types = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in model.graph.input
    }
    del model.graph.output[:]
    ordered = sorted(names)
    for index, name in enumerate(ordered):
        full, magnitude, most = (f"measured_{what}_{index}" for what in ("full", "abs", "max"))
        model.graph.node.extend(
            [
                helper.make_node("Cast", [name], [full], to=onnx.TensorProto.FLOAT),
                helper.make_node("Abs", [full], [magnitude]),
                helper.make_node("ReduceMax", [magnitude], [most], keepdims=0),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(most, onnx.TensorProto.FLOAT, []))
    copy = path.with_name(f"{path.stem}.measured.onnx")
    try:
        onnx.save(model, str(copy))
        session = onnxruntime.InferenceSession(copy, providers=["CPUExecutionProvider"])
        largest = np.zeros(len(ordered), np.float32)
        for sample in samples:
            bank = gather([[]] * len(sample["sample"]), layout)
            given = {name: array.astype(types[name]) for name, array in {**sample, **bank}.items()}
            largest = np.maximum(largest, np.stack(session.run(None, given)))
    finally:
        copy.unlink(missing_ok=True)
    return dict(zip(ordered, largest.tolist(), strict=True))


def _rewrite(graph: Any, nodes: Sequence[Any], largest: Mapping[str, float]) -> None:
    """Put what the nodes take into FP8, each value and each weight once."""
    from onnx import TensorProto, helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    quantized = {id(node) for node in nodes}
    made: dict[str, list[Any]] = {}  # what a name's FP8 is made by
    rewritten: list[Any] = []
    graph.initializer.append(
        helper.make_tensor(_ZERO, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    )
    for node in list(graph.node):
        if id(node) in quantized:
            activation, weight = node.input[:2]
            kind = weights[weight].data_type
            if activation not in made:
                scale = _scale_of(largest[activation], kind)
                graph.initializer.append(_constant(activation + _SCALE, scale, kind))
                made[activation] = _pair(activation)
                rewritten += made[activation]
            if weight not in made:
                graph.initializer.extend(_stored(weights[weight]))
                made[weight] = [_dequantize(weight)]
                rewritten += made[weight]
            node.input[0], node.input[1] = activation + _AFTER, weight + _AFTER
        rewritten.append(node)
    del graph.node[:]
    graph.node.extend(rewritten)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _scale_of(largest: float, kind: int) -> float:
    """Return the scale of values up to a magnitude, as the graph's type holds it; never 0."""
    from onnx import helper

    dtype = helper.tensor_dtype_to_np_dtype(kind)
    rounded = float(np.asarray(largest / LARGEST_E4M3).astype(dtype))
    return rounded or 1.0


def _constant(name: str, value: float, kind: int) -> Any:
    from onnx import helper

    return helper.make_tensor(name, kind, [], [value])


def _stored(tensor: Any) -> tuple[Any, Any]:
    """Return a weight in FP8, and its scale."""
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    values = numpy_helper.to_array(tensor).astype(np.float32)
    scale = _scale_of(float(np.abs(values).max()), tensor.data_type)
    # A scale that was rounded down would put the largest just over, which E4M3 has no number for.
    scaled = np.clip(values / scale, -LARGEST_E4M3, LARGEST_E4M3)
    data = scaled.astype(ml_dtypes.float8_e4m3fn).tobytes()
    stored = helper.make_tensor(
        tensor.name + _STORED, TensorProto.FLOAT8E4M3FN, tensor.dims, data, raw=True
    )
    return stored, _constant(tensor.name + _SCALE, scale, tensor.data_type)


def _pair(name: str) -> list[Any]:
    from onnx import helper

    quantize = helper.make_node(
        "QuantizeLinear", [name, name + _SCALE, _ZERO], [name + _STORED], name=f"{name}/quantize"
    )
    return [quantize, _dequantize(name)]


def _dequantize(name: str) -> Any:
    from onnx import helper

    return helper.make_node(
        "DequantizeLinear",
        [name + _STORED, name + _SCALE, _ZERO],
        [name + _AFTER],
        name=f"{name}/dequantize",
    )
