"""Figure 3: requests that share batches step by step, against those who wait for one another."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy.typing as npt
import torch
from measuring.timing import in_turns, ratios, side_by_side, spread
from serve.bench import Bench
from serve.drawing import decode, draw_latents
from serve.engine import Arrays, Evaluate, Served, counted, serving
from serve.load import (
    LOAD,
    LONG_STEPS,
    SHORT_STEPS,
    Draw,
    under_load,
)
from serve.whole import WholeRequestServer

from toile.core.artifacts.local import LocalStore
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.repository import FrontConfig

TOGETHER = 8
"""Requests that the whole-request server draws at a time: 16 samples, the front's most."""
MIXED_STEPS = (SHORT_STEPS,) * 4 + (LONG_STEPS,)
"""The mix as a sequence, for a closed loop."""
ALIKE = 1e-2
"""Most by which latents of the same seed may differ between the arms."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure throughput at saturation, then latencies under a share of that load."""
    bench.say("saturation")
    saturation = _saturation(bench)
    bench.say("Poisson mix")
    with _denoiser(bench, "mix", FrontConfig(threads=bench.threads)) as (_, denoiser):
        return {"saturation": saturation, "mix": _mix(bench, denoiser)}


def _saturation(bench: Bench) -> dict[str, Any]:
    """Count the steps a second of many clients who draw latents all the time."""
    caps = {
        "shared": FrontConfig(threads=bench.threads),
        "alone": FrontConfig(max_batch=2, threads=bench.threads),
    }
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(_denoiser(bench, name, config))
            for name, config in caps.items()
        }
        counters: dict[str, list[dict[str, float]]] = {name: [] for name in servers}

        def arm(name: str) -> Callable[[int], float]:
            served, denoiser = servers[name]

            def run(_: int) -> float:
                before = served.counters()
                took, steps = _draw_all(bench, denoiser)
                found = counted(before, served.counters())
                counters[name].append({**found, "busy_share": found["busy_seconds"] / took})
                return steps / took

            return run

        arms = {name: arm(name) for name in servers}
        for name, warm_up in arms.items():
            warm_up(0)
            counters[name].clear()
        rates = in_turns(arms, bench.scale.rounds)
    return {
        "clients": bench.scale.saturating_clients,
        "steps_per_second": {name: spread(values) for name, values in rates.items()},
        "ratio": spread(ratios(rates["shared"], rates["alone"])),
        "triton": {
            name: {key: spread([one[key] for one in found]) for key in found[0]}
            for name, found in counters.items()
        },
        "raw": rates,
    }


def _draw_all(bench: Bench, denoiser: TritonDenoiser) -> tuple[float, int]:
    """Have all clients draw latents; return the seconds that it took, and the steps."""
    clients, images = bench.scale.saturating_clients, max(1, bench.scale.images_per_client // 2)

    def client(number: int) -> None:
        with denoiser.session([]) as unet:
            for image in range(images):
                draw_latents(
                    bench.bundle,
                    unet,
                    steps=bench.scale.steps,
                    seed=number * images + image,
                    size=bench.size,
                )

    return side_by_side(clients, client), clients * images * bench.scale.steps


def _mix(bench: Bench, denoiser: TritonDenoiser) -> dict[str, Any]:
    engine = _evaluate_by(denoiser)
    together = WholeRequestServer(bench.bundle, engine, most=TOGETHER, size=bench.size)
    in_line = WholeRequestServer(bench.bundle, engine, most=1, size=bench.size)
    try:
        _check_alike(bench, denoiser, together)
        draws = {
            "continuous": _through_triton(bench, denoiser),
            "whole requests": _by(bench, together),
            "one at a time": _by(bench, in_line),
        }
        capacity = _capacity(
            draws["continuous"], bench.scale.saturating_clients, bench.scale.images_per_client
        )
        servers = under_load(draws, LOAD * capacity, bench.scale.trace_seconds, bench.scale.rounds)
        return {
            "capacity_images_per_second": capacity,
            "offered_images_per_second": LOAD * capacity,
            "trace_seconds": bench.scale.trace_seconds,
            "servers": servers,
        }
    finally:
        together.close()
        in_line.close()


def _through_triton(bench: Bench, denoiser: TritonDenoiser) -> Draw:
    def draw(steps: int, seed: int) -> None:
        with denoiser.session([]) as unet:
            latents = draw_latents(bench.bundle, unet, steps=steps, seed=seed, size=bench.size)
        decode(bench.bundle, latents)

    return draw


def _evaluate_by(denoiser: TritonDenoiser) -> Evaluate:
    """The engine that continuous batching has, a call for each batch of the peers'."""

    def evaluate(arrays: Arrays) -> npt.NDArray[Any]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        conditions = {name: tensors[name] for name in ("text_embeds", "time_ids")}
        with denoiser.session([]) as unet:
            predicted = unet(
                tensors["sample"],
                tensors["timestep"],
                encoder_hidden_states=tensors["encoder_hidden_states"],
                added_cond_kwargs=conditions,
                return_dict=False,
            )[0]
        found: npt.NDArray[Any] = predicted.numpy()
        return found

    return evaluate


def _by(bench: Bench, server: WholeRequestServer) -> Draw:
    def draw(steps: int, seed: int) -> None:
        decode(bench.bundle, server.draw(steps, seed))

    return draw


def _capacity(draw: Draw, clients: int, images: int) -> float:
    """Return the images a second of the mix when callers draw all the time."""

    def client(number: int) -> None:
        for image in range(images):
            draw(MIXED_STEPS[(number + image) % len(MIXED_STEPS)], number * images + image)

    return clients * images / side_by_side(clients, client)


def _check_alike(bench: Bench, denoiser: TritonDenoiser, server: WholeRequestServer) -> None:
    """See to it that the arms draw the same image."""
    with denoiser.session([]) as unet:
        ours = draw_latents(bench.bundle, unet, steps=SHORT_STEPS, seed=1, size=bench.size)
    most = float(torch.max(torch.abs(ours - server.draw(SHORT_STEPS, 1))))
    if not most < ALIKE:
        raise RuntimeError(f"the servers draw different images: latents differ by {most}")


@contextmanager
def _denoiser(
    bench: Bench, name: str, config: FrontConfig
) -> Iterator[tuple[Served, TritonDenoiser]]:
    folder = bench.scratch / f"continuous-{name}"
    with serving(bench.environment, bench.exported, folder, config) as served:
        yield served, served.denoiser(LocalStore(folder / "artifacts"))
