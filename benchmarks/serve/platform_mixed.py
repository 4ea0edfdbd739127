"""Figure 2 again, through the whole platform: users with a LoRA each, or one for all."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from measuring.timing import in_turns, ratios, side_by_side, spread
from serve.adapters import random_adapters, write_files
from serve.bench import Bench
from serve.drawing import GUIDANCE_SCALE, PROMPT
from serve.mixed import RANK
from serve.stack import PROJECT, Platform, platform

from toile.cli.operations import import_model_version
from toile.diffusion.adapters import DIFFUSERS_FILE
from toile.v1 import train_pb2


def measure(bench: Bench) -> dict[str, Any]:
    """Count the images a second of clients with a LoRA each, and with one for all."""
    most = max(bench.scale.clients)
    variables = {
        "TOILE_LIMITS__RUNNING_GENERATIONS": str(most),
        "TOILE_LIMITS__QUEUED_GENERATIONS": str(most),
    }
    bench.say("starting a platform, with its engines")
    with platform(bench.home, bench.run, variables) as running:
        versions = _import(bench, running, most)
        found: dict[str, Any] = {}
        for clients in bench.scale.clients:
            bench.say(f"{clients} clients of the platform")
            found[str(clients)] = _arms(bench, running, versions[:clients])
    return found


def _import(bench: Bench, running: Platform, count: int) -> list[str]:
    """Return model versions; those of an earlier run are taken again."""
    adapters = random_adapters(bench.exported.layout, count, rank=RANK)
    folders = write_files(bench.scratch / "platform-loras", adapters)
    versions = []
    for number, folder in enumerate(folders):
        file = folder / DIFFUSERS_FILE
        header = train_pb2.ImportModelVersionHeader(
            parent=PROJECT,
            model_id=f"bench-{number}",
            request_id=f"bench-{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}",
        )
        versions.append(import_model_version(running.clients, header, file).name)
    return versions


def _arms(bench: Bench, running: Platform, versions: Sequence[str]) -> dict[str, Any]:
    clients = len(versions)
    images = max(1, bench.scale.images_per_client * 8 // clients)

    def draw(version: str, seed: int) -> None:
        running.draw(
            PROMPT,
            seed=seed,
            steps=bench.scale.steps,
            guidance_scale=GUIDANCE_SCALE,
            adapter=version,
        )

    def rate(chosen: Sequence[str]) -> Callable[[int], float]:
        def client(number: int) -> None:
            for image in range(images):
                draw(chosen[number], number * images + image)

        return lambda _: clients * images / side_by_side(clients, client)

    for version in versions:  # fetch, pack and make resident
        draw(version, 0)
    rates = in_turns(
        {"a LoRA each": rate(versions), "one LoRA": rate(versions[:1] * clients)},
        bench.scale.rounds,
    )
    return {
        "images_per_client": images,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "each_over_one": spread(ratios(rates["a LoRA each"], rates["one LoRA"])),
        "raw": rates,
    }
