"""How much GPU memory an engine will want, told from its ONNX file before it is built.

    total = weights + inputs + activations

- *weights*: bytes of the file's constants. An engine of the full SDXL UNet is 4 % larger.
- *inputs*: of one call at the most that the profile allows. The bank's are the larger part: 3 GB
  for SDXL at batch 16 and rank 64.
- *activations*: the most bytes of values that are needed at one time when the graph's nodes run in
  their order, at the most that the profile allows. Attention scores are left out, because fused
  attention never writes them (FlashAttention, arXiv:2205.14135); all else counts as if nothing were
  fused, so an engine should want less.

No engine's use on a GPU has been compared with it yet. What the driver, its libraries and torch
take beside is not in it: some hundred megabytes.
"""

import ast
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toile.core.errors import FailedPreconditionError
from toile.diffusion.engines import EngineProfile


@dataclass(frozen=True)
class EngineMemory:
    """Estimated bytes."""

    weights: int
    inputs: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.inputs + self.activations

    def __str__(self) -> str:
        return (
            f"{self.total / 1e9:.2f} GB: {self.weights / 1e9:.2f} for weights, "
            f"{self.inputs / 1e9:.2f} for inputs, {self.activations / 1e9:.2f} for activations"
        )

    def check(self, limit_bytes: int) -> None:
        """Refuse what will not fit.

        Raises:
            FailedPreconditionError: It is over the limit (`ENGINE_TOO_LARGE`).
        """
        if self.total > limit_bytes:
            raise FailedPreconditionError(
                f"the engine would want more GPU memory than the limit of {limit_bytes / 1e9:.2f} "
                f"GB, about {self}. A lower most batch, rank or latent size needs less",
                reason="ENGINE_TOO_LARGE",
            )


def estimate_memory(path: Path, profiles: Sequence[EngineProfile]) -> EngineMemory:
    """Estimate the memory of the engine that a file from `write_onnx` becomes.

    Args:
        path: The ONNX file; weights beside it are not read.
        profiles: The engine's; one is in use at a time, and the most that one wants counts.
    """
    import onnx  # heavy, and not in every installation

    graph = onnx.load(str(path), load_external_data=False).graph
    return max((_of_profile(graph, one) for one in profiles), key=lambda memory: memory.total)


def _of_profile(graph: Any, profile: EngineProfile) -> EngineMemory:
    constants = {tensor.name for tensor in graph.initializer}
    weights = sum(_bytes(tensor.data_type, tensor.dims) for tensor in graph.initializer)
    sizes: dict[str, int] = {}
    for value in graph.input:
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        least = profile.shapes(value.name, [-1 if isinstance(d, str) else d for d in shape])
        sizes |= {s: n for s, n in zip(shape, least[2], strict=True) if isinstance(s, str)}
    values = {
        value.name: [
            _evaluate(dim.dim_param, sizes) if dim.dim_param else int(dim.dim_value)
            for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    held = {n: _bytes(types[n], shape) for n, shape in values.items() if n not in constants}
    inputs = sum(held.pop(value.name, 0) for value in graph.input)
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Softmax":
            scores = values[node.input[0]]
            held |= {n: 0 for n in _attention(made_by, node) if values[n] == scores}
    return EngineMemory(weights, inputs, _most_held(graph.node, held))


def _attention(made_by: Mapping[str, Any], softmax: Any) -> set[str]:
    """Return what a softmax gives, what it takes, and what that is scaled from."""
    names = set(softmax.output)
    open_names = [softmax.input[0]]
    while open_names:
        name = open_names.pop()
        names.add(name)
        if name in made_by and made_by[name].op_type in ("Add", "Mul", "Div"):
            open_names += [given for given in made_by[name].input if given in made_by]
    return names


def _most_held(nodes: Sequence[Any], held: Mapping[str, int]) -> int:
    """Return the most bytes of values that are alive at once."""
    uses = Counter(name for node in nodes for name in node.input)
    now = most = 0
    for node in nodes:
        now += sum(held.get(name, 0) for name in node.output)
        most = max(most, now)
        for name in node.input:
            uses[name] -= 1
            if not uses[name]:
                now -= held.get(name, 0)
    return most


def _bytes(element_type: int, shape: Sequence[int]) -> int:
    import onnx

    return math.prod(shape) * int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a size such as `8*s27` or `4*(((s44 - 1)//4)) + 4`."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Name(name):
                return sizes[name]
            case ast.Constant(int(number)):
                return number
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.FloorDiv(), right):
                return value(left) // value(right)
        raise ValueError(f"no size: {expression}")

    return value(ast.parse(expression, mode="eval").body)
