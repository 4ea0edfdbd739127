"""Time SDXL's UNet at full size on a GPU: eager, compiled, and with adapters as inputs.

Weights are random. For each size and batch it gives milliseconds a call (median, least, most),
calls and samples a second, the share of the GPU's own matrix rate, measured in the same run, and
what the bank costs over the same UNet without. `--miniature` tries the program on a CPU: its
figures say nothing of a GPU.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.networks import DenoisingNetwork, Sizes
from toile.diffusion.random_sdxl import MINIATURE_UNET_CONFIG, SDXL_UNET_CONFIG, random_unet

RESULTS = Path(__file__).with_name("results.json")
Call = Callable[[], object]


def time_calls(call: Call, runs: int, device: torch.device) -> dict[str, float]:
    """Return milliseconds a call; two calls before do not count."""
    took = []
    for index in range(runs + 2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 2:
            took.append(1e3 * (time.perf_counter() - started))
    return {"median": statistics.median(took), "least": min(took), "most": max(took)}


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int, runs: int) -> float:
    """Return floating-point operations a second in a square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2e3 * side**3 / time_calls(lambda: a @ b, runs, device)["median"]


def plain_call(unet: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Call:
    """Return a call of a UNet as the pipelines make it."""
    dtype = inputs["sample"].dtype
    conditions = {name: inputs[name].to(dtype) for name in ("text_embeds", "time_ids")}

    def call() -> None:
        unet(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            added_cond_kwargs=conditions,
            return_dict=False,
        )

    return call


def variants(
    unet: UNet2DConditionModel, sizes: Sizes, ranks: list[int], backend: str
) -> Iterator[tuple[str, str, Call]]:
    """Yield name, name of what it is compared with, and call, compiled for these sizes alone."""
    network = DenoisingNetwork(BankedUNet(unet, bank_layout(unet)))
    inputs = network.example_inputs(sizes)
    yield "eager", "", plain_call(unet, inputs)
    for rank in ranks:
        banked = network.example_inputs(Sizes(sizes.batch, rank, sizes.latent_size))
        yield f"banked rank {rank}", "eager", lambda banked=banked: network(banked)
    if backend == "none":
        return
    torch.compiler.reset()
    compiled = torch.compile(unet, backend=backend, dynamic=False)
    yield "compiled", "", plain_call(compiled, inputs)
    for rank in ranks:
        banked = network.example_inputs(Sizes(sizes.batch, rank, sizes.latent_size))
        torch.compiler.reset()
        both = torch.compile(network, backend=backend, dynamic=False)
        yield f"compiled banked rank {rank}", "compiled", lambda banked=banked, f=both: f(banked)


def measure(
    unet: UNet2DConditionModel, sizes: Sizes, rate: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure all variants at one size."""
    device = next(unet.parameters()).device
    rows: dict[str, dict[str, Any]] = {}
    flops = 0
    for name, against, call in variants(unet, sizes, arguments.rank, arguments.backend):
        if not flops:
            with FlopCounterMode(display=False) as counter:
                call()
            flops = counter.get_total_flops()
        started = time.perf_counter()
        call()
        first = time.perf_counter() - started
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        milliseconds = time_calls(call, arguments.runs, device)
        per_second = 1e3 / milliseconds["median"]
        rows[name] = {
            "variant": name,
            "batch": sizes.batch,
            "pixels": 8 * sizes.latent_size,
            "milliseconds": milliseconds,
            "calls_per_second": per_second,
            "samples_per_second": per_second * sizes.batch,
            # The bank's own products are not counted as useful work.
            "share_of_matmul_rate": flops * per_second / rate,
            "first_call_seconds": first,
        }
        if against:
            base = rows[against]["milliseconds"]["median"]
            rows[name]["bank_cost_percent"] = 100 * (milliseconds["median"] / base - 1)
        if device.type == "cuda":
            rows[name]["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        print(json.dumps(rows[name]), flush=True)
    return list(rows.values())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--miniature", action="store_true", help="try the program on a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8, 16])
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; none for without")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.miniature or torch.cuda.is_available()):
        parser.exit(2, "There is no GPU here. --miniature tries the program on a CPU.\n")
    device = torch.device("cpu" if arguments.miniature else "cuda")
    dtype = torch.float32 if arguments.miniature else torch.float16
    config = MINIATURE_UNET_CONFIG if arguments.miniature else SDXL_UNET_CONFIG
    with torch.inference_mode():
        side = 512 if arguments.miniature else 8192
        rate = matmul_rate(device, dtype, side, arguments.runs)
        unet = random_unet(config, dtype=dtype, device=str(device))
        rows = [
            row
            for pixels in arguments.pixels
            for batch in arguments.batch
            for row in measure(unet, Sizes(batch, latent_size=pixels // 8), rate, arguments)
        ]
    on_gpu = device.type == "cuda"
    results = {
        "miniature": arguments.miniature,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "precision": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "matmul_flops_per_second": rate,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
