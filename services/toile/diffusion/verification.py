"""Comparing an exported or compiled network with torch: parity and speed."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toile.diffusion.networks import NamedNetwork, Sizes

LEAST_PSNR_DB = {"fp32": 90.0, "fp16": 50.0, "bf16": 35.0, "fp8": 25.0}
"""What a faithful copy of a network reaches against fp32, with a margin of some 20 dB."""

Evaluate = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""From inputs by name to outputs by name."""


@dataclass(frozen=True)
class Parity:
    """How far two tensors are apart."""

    max_abs_difference: float
    psnr_db: float
    """10 log10(range² / mean squared difference), the range being that of what is expected."""

    @classmethod
    def of(cls, got: torch.Tensor, expected: torch.Tensor) -> "Parity":
        """Compare; what is not finite is infinitely far off, and what is equal infinitely near."""
        got, expected = got.double().cpu(), expected.double().cpu()
        if got.shape != expected.shape or not bool(got.isfinite().all()):
            return cls(float("inf"), float("-inf"))
        difference = got - expected
        square = float((difference**2).mean())
        spread = float(expected.max() - expected.min())
        psnr = torch.tensor(spread**2 / square).log10().item() * 10 if square else float("inf")
        return cls(float(difference.abs().max()), psnr)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Check:
    """What one size of inputs showed."""

    sizes: Sizes
    parity: Mapping[str, Parity]
    """By output."""
    milliseconds: Timing
    torch_milliseconds: Timing

    @property
    def least_psnr_db(self) -> float:
        """Of the worst output."""
        return min(parity.psnr_db for parity in self.parity.values())


def check(
    evaluate: Evaluate,
    network: NamedNetwork,
    reference: NamedNetwork,
    sizes: Sizes,
    *,
    runs: int,
) -> Check:
    """Compare what is to be verified with torch, on the same random inputs.

    Args:
        evaluate: The engine or the ONNX file.
        network: In torch, of the same precision; timed.
        reference: The same network in fp32, on the same device; what counts as right.
        sizes: Of the inputs.
        runs: Calls that are timed, of each.
    """
    torch.manual_seed(0)
    inputs = network.example_inputs(sizes)
    device = next(iter(inputs.values())).device
    full = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    expected, got = reference.run(full), evaluate(inputs)
    return Check(
        sizes,
        {name: Parity.of(got[name], tensor) for name, tensor in expected.items()},
        time_calls(lambda: evaluate(inputs), runs=runs, device=device),
        time_calls(lambda: network.run(inputs), runs=runs, device=device),
    )


def time_calls(call: Callable[[], object], *, runs: int, device: torch.device) -> Timing:
    """Call `runs` times after two calls that do not count; each is waited for."""
    took = []
    for index in range(runs + 2):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        if index >= 2:
            took.append(1e3 * (time.perf_counter() - started))
    return Timing(statistics.median(took), min(took), max(took))


def onnx_evaluator(path: Path, threads: int = 0) -> Evaluate:
    """Return what evaluates an ONNX file on the CPU by ONNX Runtime; all cores when threads is 0.

    Types that NumPy lacks, bfloat16 say, cannot be fed to it.
    """
    import onnxruntime  # heavy, and not in every installation

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        # It takes FP8 for integers, and makes a graph that it then refuses.
        disabled_optimizers=["QDQSelectorActionTransformer"],
    )
    wanted = [node.name for node in session.get_inputs()]
    names = [node.name for node in session.get_outputs()]

    def evaluate(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = {name: inputs[name].cpu().numpy() for name in wanted}
        values: list[Any] = session.run(None, arrays)
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return evaluate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
