"""Whether Toile's loop learns as diffusers' script does: their losses on the same draws.

Both begin with the same adapter and compute in fp32. The loop draws latents from distributions that
it has cached, the script encodes at every step.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train.arms import script_arguments
from train.task import Task

from toile.training import loop
from toile.training.caches import Cache, encoded
from toile.training.config import LoraRecipeConfig
from toile.training.lora import ADAPTER, Lora
from toile.training.noise_prediction import FramedBatch, NoisePrediction


def measure(task: Task, python: Path, script: Path, scratch: Path) -> dict[str, Any]:
    """Train by both; returns their losses, and how far losses and weights are from the loop's.

    The weights' difference is told as a share of how far they moved, as norms of all of them. What
    rounding alone makes of a training is told beside: the loop again, with the last bit of the
    adapter that it begins with disturbed.

    Args:
        task: Its pictures are of the base's own size, so that both show them as they are.
        python: Of the script's environment.
        script: The example script.
        scratch: An empty folder.
    """
    config = task.config().model_copy(update={"mixed_precision": "no"})
    draws = scratch / "draws.safetensors"
    trained = _by_the_loop(task, config, draws)
    disturbed = _by_the_loop(task, config, None)
    log = scratch / "script.log"
    command = [
        *(str(python), str(Path(__file__).with_name("drawn.py")), str(draws), str(scratch)),
        *(str(script), *script_arguments(task, scratch / "script", mixed_precision="no")),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub")}
    environment.pop("PYTHONPATH", None)
    with log.open("wb") as kept:
        done = subprocess.run(command, stdout=kept, stderr=kept, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{script.name} failed:\n{log.read_text(errors='replace')[-3000:]}")
    losses = json.loads((scratch / "losses.json").read_text(encoding="utf-8"))
    script_trained = _Trained(losses, {}, load_file(scratch / "adapter.safetensors"))
    arms = {"loop": trained, "disturbed": disturbed, "script": script_trained}
    return {
        "steps": task.steps,
        "learning_rate": config.learning_rate,
        "losses": {name: arm.losses for name, arm in arms.items()},
        "largest_relative_difference": {
            name: max(
                abs(one - other) / other
                for one, other in zip(arm.losses, trained.losses, strict=True)
            )
            for name, arm in arms.items()
        },
        "weights_difference": {
            name: _distance(arm.after, trained.after) / _distance(trained.after, trained.before)
            for name, arm in arms.items()
        },
    }


@dataclass(frozen=True)
class _Trained:
    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def _distance(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    if ones.keys() != others.keys():
        raise ValueError("the adapters have other weights")
    return math.sqrt(sum(float((ones[name] - others[name]).square().sum()) for name in ones))


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's, by the names that files give them."""
    return {
        name.replace(f".{ADAPTER}", ""): parameter.detach().clone()
        for name, parameter in network.named_parameters()
        if "lora_" in name
    }


def _by_the_loop(task: Task, config: LoraRecipeConfig, draws: Path | None) -> _Trained:
    """Train, and keep what was drawn; without a file for that, from a disturbed adapter."""
    bundle, examples = task.inputs()
    cache = encoded(bundle, examples)
    recipe = Lora(bundle, config)
    if draws is None:
        _disturb(recipe.network)
    before = _weights(recipe.network)
    objective = _Kept(
        cache,
        DDPMScheduler.from_config(bundle.scheduler_config),
        config,
        image_count=len(examples),
        native_size=bundle.native_size,
    )
    losses: list[float] = []
    loop.train(
        recipe.network,
        objective,
        [example.file_name for example in examples],
        config,
        start=None,
        on_step=lambda report: losses.append(report.step_loss),
        on_checkpoint=lambda _: None,
        stopped=lambda: False,
    )
    if draws is not None:
        adapter = {f"adapter.{name}": weight for name, weight in before.items()}
        save_file({**objective.drawn(cache), **adapter}, draws)
    return _Trained(losses, before, _weights(recipe.network))


def _disturb(network: nn.Module) -> None:
    """Change about half of an adapter's weights by a unit of the last place."""
    source = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            ulps = torch.randint(2, parameter.shape, generator=source)
            parameter.data.mul_(1 + ulps * torch.finfo(torch.float32).eps)


class _Kept(NoisePrediction):
    """The objective, which keeps what it drew."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batches: list[tuple[Sequence[int], FramedBatch]] = []

    def batch(self, indices: Sequence[int], step: int, rank: int, world_size: int) -> FramedBatch:
        batch = super().batch(indices, step, rank, world_size)
        self._batches.append((list(indices), batch))
        return batch

    def drawn(self, cache: Cache) -> dict[str, Tensor]:
        """What `drawn.Draws` takes."""
        variations = [
            (batch.drawn.latents - cache.means[indices]) / cache.deviations[indices]
            for indices, batch in self._batches
        ]
        return {
            "indices": torch.tensor([indices for indices, _ in self._batches]),
            "variations": torch.stack(variations),
            "noise": torch.stack([batch.drawn.noise for _, batch in self._batches]),
            "timesteps": torch.stack([batch.drawn.timesteps for _, batch in self._batches]),
        }
