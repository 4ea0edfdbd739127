"""Figure 2 again, through the whole platform: clients of its models with a LoRA each, or one."""

import asyncio
import time
from typing import Any

from measuring.timing import ratios, spread
from serve.adapters import random_adapters, write_files
from serve.bench import Bench
from serve.drawing import GUIDANCE_SCALE, PROMPT
from serve.mixed import RANK
from serve.stack import Platform, platform

from toile.core.artifacts import open_store, publish_folder
from toile.core.inference import Inference
from toile.v1 import inference_pb2


def measure(bench: Bench) -> dict[str, Any]:
    """Count the images a second of clients with a LoRA each, and with one for all."""
    most = max(bench.scale.clients)
    variables = {
        "TOILE_LIMITS__RUNNING_GENERATIONS": str(most),
        "TOILE_LIMITS__QUEUED_GENERATIONS": str(most),
    }
    bench.say("starting a platform, with its engines")
    with platform(bench.home, bench.run, variables) as running:
        artifacts = _publish(bench, running, most)
        found: dict[str, Any] = {}
        for clients in bench.scale.clients:
            bench.say(f"{clients} clients of the platform")
            found[str(clients)] = asyncio.run(_arms(bench, running, artifacts, clients))
    return found


def _publish(bench: Bench, running: Platform, count: int) -> list[str]:
    adapters = random_adapters(bench.exported.layout, count, rank=RANK)
    folders = write_files(bench.scratch / "platform-loras", adapters)
    store = open_store(running.settings)
    for adapter, folder in zip(adapters, folders, strict=True):
        publish_folder(store, adapter.key, folder, {})
    return [adapter.key for adapter in adapters]


async def _arms(
    bench: Bench, running: Platform, artifacts: list[str], clients: int
) -> dict[str, Any]:
    images = max(1, bench.scale.images_per_client * 8 // clients)
    async with Inference.connect(running.settings) as inference:

        async def draw(artifact: str, seed: int) -> None:
            request = inference_pb2.DiffuseRequest(
                base_artifact=running.base_artifact,
                prompt=PROMPT,
                seeds=[seed],
                steps=bench.scale.steps,
                guidance_scale=GUIDANCE_SCALE,
                adapters=[inference_pb2.Adapter(artifact=artifact, weight=1.0)],
            )
            async for _ in inference.diffuse(request):
                pass

        async def client(artifact: str, number: int) -> None:
            for image in range(images):
                await draw(artifact, number * images + image)

        async def rate(chosen: list[str]) -> float:
            started = time.perf_counter()
            await asyncio.gather(*(client(key, number) for number, key in enumerate(chosen)))
            return clients * images / (time.perf_counter() - started)

        for artifact in artifacts[:clients]:  # fetch, pack and make resident
            await draw(artifact, 0)
        chosen = {"a LoRA each": artifacts[:clients], "one LoRA": [artifacts[0]] * clients}
        rates: dict[str, list[float]] = {name: [] for name in chosen}
        for number in range(bench.scale.rounds):
            names = list(chosen) if number % 2 == 0 else list(chosen)[::-1]
            for name in names:
                rates[name].append(await rate(chosen[name]))
    return {
        "images_per_client": images,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "each_over_one": spread(ratios(rates["a LoRA each"], rates["one LoRA"])),
        "raw": rates,
    }
