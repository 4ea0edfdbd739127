"""Figure 2: many clients with a LoRA each, against one LoRA for all and against diffusers.

Every arm draws whole images of the same size and number of steps with LoRAs of rank 16 from the
same files. Clients are threads of this process with stock pipelines.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring.timing import in_turns, ratios, side_by_side, spread
from serve.adapters import random_adapters, write_files
from serve.bench import Bench
from serve.drawing import decode, draw_latents
from serve.engine import Served, counted, serving
from serve.peers import FusingServer, Peer, SettingServer

from toile.core.artifacts.local import LocalStore
from toile.diffusion.denoiser import LoadedAdapter, cpu_has_bfloat16
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.repository import FrontConfig

RANK = 16
PEER_CLIENTS = 8

Rate = Callable[[int], float]
"""Images a second of one round."""


def measure(bench: Bench) -> dict[str, Any]:
    """Compare our own arms for each number of clients, then the peers with eight."""
    adapters = random_adapters(bench.exported.layout, max(bench.scale.clients), rank=RANK)
    folder = bench.scratch / "mixed"
    found: dict[str, Any] = {"rank": RANK, "steps": bench.scale.steps, "clients": {}}
    config = FrontConfig(threads=bench.threads)
    with serving(bench.environment, bench.exported, folder, config) as served:
        denoiser = served.denoiser(LocalStore(folder / "artifacts"))
        for adapter in adapters:  # pack them and make them resident
            with denoiser.session([adapter]) as unet:
                draw_latents(bench.bundle, unet, steps=1, seed=0, size=bench.size)
        for clients in bench.scale.clients:
            bench.say(f"{clients} clients")
            found["clients"][str(clients)] = _own_arms(bench, served, denoiser, adapters, clients)
        bench.say("diffusers servers")
        clients = min(PEER_CLIENTS, *bench.scale.clients)
        found["peers"] = _peers(bench, denoiser, adapters[:clients])
    return found


def _own_arms(
    bench: Bench,
    served: Served,
    denoiser: TritonDenoiser,
    adapters: Sequence[LoadedAdapter],
    clients: int,
) -> dict[str, Any]:
    """Measure a LoRA for each client, one for all, and none."""
    chosen: dict[str, list[Sequence[LoadedAdapter]]] = {
        "a LoRA each": [[adapter] for adapter in adapters[:clients]],
        "one LoRA": [[adapters[0]]] * clients,
        "no LoRA": [[]] * clients,
    }
    images = max(1, bench.scale.images_per_client * 8 // clients)
    counters: dict[str, dict[str, float]] = {}

    def arm(name: str) -> Rate:
        rate = _rate(
            bench, images, clients, lambda c, s: _ours(bench, denoiser, chosen[name][c], s)
        )

        def run(number: int) -> float:
            before = served.counters()
            found = rate(number)
            counters[name] = counted(before, served.counters())
            return found

        return run

    rates = in_turns({name: arm(name) for name in chosen}, bench.scale.rounds)
    return {
        "images_per_client": images,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "each_over_one": spread(ratios(rates["a LoRA each"], rates["one LoRA"])),
        "triton_last_round": counters,
        "raw": rates,
    }


def _peers(
    bench: Bench, denoiser: TritonDenoiser, adapters: Sequence[LoadedAdapter]
) -> dict[str, Any]:
    folders = write_files(bench.scratch / "loras", adapters)
    dtypes = {"fp32": torch.float32}
    if cpu_has_bfloat16():
        dtypes["bf16"] = torch.bfloat16
    servers: dict[str, Peer] = {}
    for name, dtype in dtypes.items():
        servers[f"set_adapters, {name}"] = SettingServer(bench.bundle, folders, dtype)
        servers[f"load and fuse, {name}"] = FusingServer(bench.bundle, folders, dtype)
    clients = len(adapters)

    def peer(server: Peer) -> Rate:
        def draw(client: int, seed: int) -> torch.Tensor:
            return server.draw(client, steps=bench.scale.steps, seed=seed)

        return _rate(bench, 1, clients, draw)

    arms = {
        "toile": _rate(
            bench,
            bench.scale.images_per_client,
            clients,
            lambda client, seed: _ours(bench, denoiser, [adapters[client]], seed),
        ),
        **{name: peer(server) for name, server in servers.items()},
    }
    for server in servers.values():
        server.draw(0, steps=1, seed=0)
    rates = in_turns(arms, bench.scale.rounds)
    return {
        "clients": clients,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "toile_over": {name: spread(ratios(rates["toile"], rates[name])) for name in servers},
        "raw": rates,
    }


def _ours(
    bench: Bench, denoiser: TritonDenoiser, adapters: Sequence[LoadedAdapter], seed: int
) -> torch.Tensor:
    with denoiser.session(adapters) as unet:
        return draw_latents(bench.bundle, unet, steps=bench.scale.steps, seed=seed, size=bench.size)


def _rate(
    bench: Bench, images: int, clients: int, draw: Callable[[int, int], torch.Tensor]
) -> Rate:
    """Return a way to count the images a second of clients who draw so many each."""

    def client(number: int) -> None:
        for image in range(images):
            decode(bench.bundle, draw(number, number * images + image))

    return lambda _: clients * images / side_by_side(clients, client)
