from pathlib import Path

import pytest
import torch

from toile.core.errors import FailedPreconditionError
from toile.diffusion.engine_memory import EngineMemory, estimate_memory
from toile.diffusion.engines import EngineProfile
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import Sizes, open_network
from toile.diffusion.shipped import shipped_bundle_path

onnx = pytest.importorskip("onnx", reason="the engine extra is not installed")
PROFILE = EngineProfile(batch=(1, 2, 4), latent_size=(8, 8, 16))


def save(path: Path, nodes: list[str], inputs: str, values: str) -> Path:
    """Write a graph in ONNX's text form."""
    text = f'<ir_version: 9, opset_import: ["" : 18]> toy ({inputs}) => (float[batch,4] out)'
    body = "\n".join(nodes)
    onnx.save(onnx.parser.parse_model(f"{text} <{values}> {{ {body} }}"), path)
    return path


def test_values_count_while_they_are_needed(tmp_path: Path):
    nodes = ["a = Relu(latents)", "b = Relu(a)", "c = Relu(b)", "out = Add(c, a)"]
    values = "float[batch,4] a, float[batch,4] b, float[batch,4] c"
    path = save(tmp_path / "toy.onnx", nodes, "float[batch,4] latents", values)
    row = 4 * 4 * 4  # batch, width, bytes
    # a stays until the end, so b and c are there beside it.
    assert estimate_memory(path, [PROFILE]) == EngineMemory(0, row, 3 * row)


def test_attention_scores_are_not_counted(tmp_path: Path):
    nodes = [
        "query = Relu(latents)",
        "scores = MatMul(query, query)",
        "scaled = Mul(scores, scores)",
        "weights = Softmax(scaled)",
        "out = ReduceMax(weights)",
    ]
    square = "float[batch,4,s1,s1]"
    values = f"float[batch,4,1,s1] query, {square} scores, {square} scaled, {square} weights"
    path = save(tmp_path / "toy.onnx", nodes, "float[batch,4,1,s1] latents", values)
    query, out = 4 * 4 * 16 * 4, 4 * 4 * 4
    assert estimate_memory(path, [PROFILE]).activations == max(query, out)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_weights_and_inputs_are_those_of_the_network(tmp_path: Path, part: str):
    network = open_network(shipped_bundle_path(), part, dtype=torch.float16)
    memory = estimate_memory(write_onnx(network, tmp_path / "x.onnx"), [PROFILE])
    inputs = network.example_inputs(Sizes(4, latent_size=16))
    assert memory.inputs == sum(tensor.nbytes for tensor in inputs.values())
    used = {"vae": ("vae.decoder.", "vae.post_quant"), "text_encoder_2": ("",)}[part]
    weights = sum(p.nbytes for n, p in network.named_parameters() if n.startswith(used))
    assert memory.weights == pytest.approx(weights, rel=0.02)
    assert memory.activations > max(tensor.nbytes for tensor in network.run(inputs).values())


def test_an_engine_over_the_limit_is_refused():
    memory = EngineMemory(weights=5 * 10**9, inputs=10**9, activations=2 * 10**9)
    memory.check(8 * 10**9)
    with pytest.raises(FailedPreconditionError, match=r"8\.00 GB: 5\.00 for weights") as caught:
        memory.check(8 * 10**9 - 1)
    assert caught.value.reason == "ENGINE_TOO_LARGE"
