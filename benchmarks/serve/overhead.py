"""Figure 1: one client of the platform, against the bare pipeline in its own process.

Every arm draws the same images from prompts that none has seen, so that each encodes them. One
client asks the models, as the services do, and gets a PNG; one asks GenerateService and downloads
the image that it stored, so that what is recorded, encoded and stored is the platform's expense,
too. The others have an image in memory. All but torch's evaluate the same ONNX file with the same
threads. Some images are drawn with more steps, too: the difference tells what a step costs from
what an image costs once.
"""

import asyncio
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring.timing import differences, in_turns, ratios, spread
from PIL import Image
from serve.bench import Bench
from serve.drawing import GUIDANCE_SCALE, PROMPT, stock_pipeline
from serve.engine import LocalEngine, calling_unet
from serve.render import MODELS, PEER, SERVICE
from serve.stack import Platform, platform

from toile.core.inference import Inference
from toile.diffusion.denoiser import TorchDenoiser, cpu_has_bfloat16
from toile.v1 import inference_pb2

OURS = (MODELS, SERVICE)
ALIKE_DECIBELS = 50.0
MORE_STEPS = 4
"""Times as many steps has a long drawing."""

Arm = Callable[[int, int], Image.Image]
"""Draws an image: its number, its steps."""


def measure(bench: Bench) -> dict[str, Any]:
    """Draw in turns by every arm."""
    bench.say("starting a platform, with its engines")
    with platform(bench.home, bench.run) as running, asyncio.Runner() as runner:
        engine = LocalEngine(running.onnx, bench.exported.layout, bench.threads)
        arms: dict[str, Arm] = {
            MODELS: _through_models(running, runner),
            SERVICE: _through_service(running),
            PEER: _in_process(bench, calling_unet(bench.exported.unet_config, engine)),
            "in process, torch fp32": _torch(bench, bfloat16=False),
        }
        if cpu_has_bfloat16():
            arms["in process, torch bf16"] = _torch(bench, bfloat16=True)
        steps = bench.scale.steps
        plain = arms[PEER](-1, steps)
        decibels = min(_decibels(arms[name](-1, steps), plain) for name in OURS)
        if decibels < ALIKE_DECIBELS:
            raise RuntimeError(f"the arms draw different images: {decibels:.0f} dB")
        for arm in arms.values():
            arm(-2, steps)
        bench.say("drawing in turns")
        took = in_turns(
            {name: _timed(arm, steps) for name, arm in arms.items()}
            | {_long(name): _timed(arms[name], MORE_STEPS * steps) for name in (*OURS, PEER)},
            bench.scale.overhead_rounds,
        )
    long = {name: took.pop(_long(name)) for name in (*OURS, PEER)}
    a_step = {
        name: [
            1e3 * value / ((MORE_STEPS - 1) * steps) for value in differences(values, took[name])
        ]
        for name, values in long.items()
    }
    return {
        "steps": steps,
        "size": bench.size,
        "alike_decibels": decibels,
        "latency_seconds": {name: spread(values) for name, values in took.items()},
        "ratio": {
            name: {ours: spread(ratios(took[ours], values)) for ours in OURS}
            for name, values in took.items()
            if name not in OURS
        },
        "over_ms_a_step": {
            ours: spread([1e3 * value / steps for value in differences(took[ours], took[PEER])])
            for ours in OURS
        },
        "ms_a_further_step": {name: spread(values) for name, values in a_step.items()},
        "over_ms_a_further_step": {
            ours: spread(differences(a_step[ours], a_step[PEER])) for ours in OURS
        },
        "long_steps": MORE_STEPS * steps,
        "raw": took,
        "raw_long": long,
    }


def _long(name: str) -> str:
    return f"{name}, more steps"


def _timed(arm: Arm, steps: int) -> Callable[[int], float]:
    def run(number: int) -> float:
        started = time.perf_counter()
        arm(number, steps)
        return time.perf_counter() - started

    return run


def _prompt(number: int) -> str:
    return f"{PROMPT}, number {number}"


def _through_models(running: Platform, runner: asyncio.Runner) -> Arm:
    async def connect() -> Inference:
        return Inference.connect(running.settings)

    client = runner.run(connect())

    async def draw(number: int, steps: int) -> bytes:
        request = inference_pb2.DiffuseRequest(
            base_artifact=running.base_artifact,
            prompt=_prompt(number),
            seeds=[number + 10],
            steps=steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        found = b""
        async for event in client.diffuse(request):
            if event.HasField("image"):
                found = event.image.png
        return found

    return lambda number, steps: Image.open(io.BytesIO(runner.run(draw(number, steps))))


def _through_service(running: Platform) -> Arm:
    def draw(number: int, steps: int) -> Image.Image:
        file = running.draw(
            _prompt(number),
            seed=number + 10,
            steps=steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        return Image.open(io.BytesIO(file))

    return draw


@torch.inference_mode()
def _draw(bench: Bench, unet: Any, number: int, steps: int) -> Image.Image:
    image: Image.Image = stock_pipeline(bench.bundle, unet, encoders=True)(
        _prompt(number),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator("cpu").manual_seed(number + 10),
        width=bench.size,
        height=bench.size,
    ).images[0]
    return image


def _in_process(bench: Bench, unet: Any) -> Arm:
    return lambda number, steps: _draw(bench, unet, number, steps)


def _torch(bench: Bench, *, bfloat16: bool) -> Arm:
    denoiser = TorchDenoiser(bench.bundle, bfloat16=bfloat16)

    def draw(number: int, steps: int) -> Image.Image:
        with denoiser.session([]) as unet:
            return _draw(bench, unet, number, steps)

    return draw


def _decibels(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one, np.float64) - np.asarray(other.convert("RGB"), np.float64)
    error = float(np.mean(difference**2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
