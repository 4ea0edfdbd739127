"""Train by Toile's loop, or run what it cannot do without; prints each step's end as JSON.

A process of its own, so that its memory can be compared with the peer's. `pure` computes the
UNet's prediction, the squared error and the gradients of one batch over and over: no data, no
noise, no optimizer.
"""

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from train.task import Task

from toile.training import loop
from toile.training.batches import loss_sum, make_batch
from toile.training.caches import Cache, encoded
from toile.training.lora import Lora
from toile.training.noise_prediction import NoisePrediction


def main() -> None:
    """Run the arm that the first argument names, on the task that is the second."""
    arm, described = sys.argv[1], json.loads(sys.argv[2])
    described.update(base=Path(described["base"]), folder=Path(described["folder"]))
    task = Task(**described)
    bundle, examples = task.inputs()
    began = time.monotonic()
    cache = encoded(bundle, examples)
    _say(cache_seconds=time.monotonic() - began)
    scheduler = DDPMScheduler.from_config(bundle.scheduler_config)
    recipe = Lora(bundle, task.config())
    if arm == "pure":
        _pure(recipe, cache, scheduler, task, bundle.native_size)
        return
    loop.train(
        recipe.network,
        NoisePrediction(
            cache,
            scheduler,
            task.config(),
            image_count=len(examples),
            native_size=bundle.native_size,
        ),
        [example.file_name for example in examples],
        task.config(),
        start=None,
        on_step=lambda report: _say(step=report.step, loss=report.loss),
        on_checkpoint=lambda _: None,
        stopped=lambda: False,
    )


def _pure(recipe: Lora, cache: Cache, scheduler: DDPMScheduler, task: Task, size: int) -> None:
    config = task.config()
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
    unet = recipe.network.train()
    batch = make_batch(cache, range(task.batch_size), config, 0, scheduler, 0, 1)
    for step in range(1, task.steps + 1):
        unet.zero_grad(set_to_none=True)
        loss_sum(unet, batch, scheduler, config, time_ids).backward()
        _say(step=step)


def _say(**facts: float) -> None:
    print(json.dumps({"at": time.monotonic(), **facts}), flush=True)


if __name__ == "__main__":
    main()
