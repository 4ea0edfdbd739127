"""Figure 3 on a modelled GPU: which batch caps suit SDXL at 512 and 1024 pixels.

The engine sleeps as long as an A100 would work: `base_ms + sample_ms * samples` for one
evaluation of SDXL's UNet. Nothing of it was measured here; it follows from published latencies.

1024 x 1024, TensorRT fp16, A100, from Stability AI's and NVIDIA's model card
(https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt): four steps of the LCM
version, without guidance and so of one sample, take 192.0 ms in the UNet, or 48.0 each; thirty
steps with guidance, of two samples, take 2742 ms in all, of which the card's other table gives
228 ms to the VAE and 1 ms to CLIP, or 83.8 each. So a second sample adds 35.8 ms, and 12.2 ms do
not depend on it.

512 x 512, TensorRT fp16 with dynamic shapes (batch 1 to 8, 512 to 768 pixels), A100, SDXL Turbo,
from https://github.com/microsoft/onnxruntime/pull/18627: one and four steps of one image take
51.5 and 118.8 ms, so that an evaluation of one sample takes 22.4; of four images 139.9 and 307.6,
so that one of four samples takes 55.9. A sample adds 11.2 ms, and 11.3 do not depend on it.

Two points make a line and cannot test it: only a GPU can.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from serve.bench import Bench
from serve.continuous import TOGETHER
from serve.drawing import draw_latents
from serve.engine import Arrays, Evaluate, Served, counted, serving
from serve.load import LOAD, MEAN_STEPS, Draw, under_load
from serve.whole import WholeRequestServer

from toile.core.artifacts.local import LocalStore
from toile.diffusion.triton.repository import FrontConfig

STANDIN = Path(__file__).with_name("standin")
"""Folder with the module `onnxruntime` that sleeps."""


@dataclass(frozen=True)
class Curve:
    """What a batch costs."""

    size: int
    """Side of the images, pixels."""
    base_ms: float
    sample_ms: float

    def seconds(self, samples: int) -> float:
        """Return what one evaluation takes."""
        return (self.base_ms + self.sample_ms * samples) / 1e3

    def images_per_second(self, samples: int) -> float:
        """Return how many images of the mix full batches draw, two samples for each."""
        return samples / 2 / self.seconds(samples) / MEAN_STEPS


CURVES = (Curve(512, 11.3, 11.2), Curve(1024, 12.2, 35.8))


def measure(bench: Bench) -> dict[str, Any]:
    """Replay the mix against each cap and against the peers, at both sizes."""
    return {
        str(curve.size): _at_size(bench, curve, bench.scale.modelled_seconds[place])
        for place, curve in enumerate(CURVES)
    }


def _at_size(bench: Bench, curve: Curve, trace_seconds: float) -> dict[str, Any]:
    """Give all caps and peers the same trace: a share of what the largest cap could do."""
    offered = LOAD * curve.images_per_second(max(bench.scale.modelled_caps))
    servers: dict[str, Any] = {}
    for cap in bench.scale.modelled_caps:
        bench.say(f"modelled, {curve.size} pixels, at most {cap} samples")
        name = f"at most {cap} samples"
        with _served(bench, curve, cap) as (served, draw):
            before = served.counters()
            servers |= under_load({name: draw}, offered, trace_seconds, 1)
            servers[name]["triton"] = counted(before, served.counters())
            servers[name]["most_images_per_second"] = curve.images_per_second(cap)
    for name, most in (("whole requests", TOGETHER), ("one at a time", 1)):
        bench.say(f"modelled, {curve.size} pixels, {name}")
        peer = WholeRequestServer(bench.bundle, _sleeping(curve), most=most, size=curve.size)
        servers |= under_load({name: peer.draw}, offered, trace_seconds, 1)
        servers[name]["most_images_per_second"] = curve.images_per_second(2 * most)
        peer.close()
    return {
        "curve": asdict(curve),
        "offered_images_per_second": offered,
        "trace_seconds": trace_seconds,
        "servers": servers,
    }


@contextmanager
def _served(bench: Bench, curve: Curve, cap: int) -> Iterator[tuple[Served, Draw]]:
    """Serve the modelled engine, and draw latents alone: on a GPU the VAE would be there, too."""
    folder = bench.scratch / f"modelled-{curve.size}-{cap}"
    folder.mkdir()
    engine = folder / "curve.json"
    engine.write_text(json.dumps(asdict(curve)), encoding="utf-8")
    config = FrontConfig(max_batch=cap, batch_pixels=cap * (curve.size // 8) ** 2)
    exported = replace(bench.exported, onnx=engine)
    triton = serving(bench.environment, exported, folder / "triton", config, modules=STANDIN)
    with triton as served:
        denoiser = served.denoiser(LocalStore(folder / "artifacts"))

        def draw(steps: int, seed: int) -> None:
            with denoiser.session([]) as unet:
                draw_latents(bench.bundle, unet, steps=steps, seed=seed, size=curve.size)

        draw(1, 0)
        yield served, draw


def _sleeping(curve: Curve) -> Evaluate:
    def evaluate(arrays: Arrays) -> npt.NDArray[Any]:
        sample = arrays["sample"]
        time.sleep(curve.seconds(len(sample)))
        return np.zeros(sample.shape, np.float32)

    return evaluate
