"""The LoRA recipe's loop: a plain function over torch.

Shapes: B images in a step on this rank, C channels of a text embedding, P of a pooled one.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch import distributed as dist

from toile.core.errors import CancelledError, ToileError
from toile.diffusion.denoiser import cpu_has_bfloat16
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint, to_parameters
from toile.training.config import LoraRecipeConfig
from toile.training.data import batch_indices, generator
from toile.training.diffusion_loss import (
    add_noise,
    min_snr_weights,
    offset_noise,
    prediction_target,
    squared_or_huber,
)
from toile.training.optimizers import make_optimizer, optimizer_state, restore_optimizer
from toile.training.schedules import learning_rate

ADAPTER = "default"
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
SMOOTHING_STEPS = 25
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class StepReport:
    """What is known after a step."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step.

    Attributes:
        latents: Clean latents, `[B, 4, h, w]`.
        noise: What is added to them, `[B, 4, h, w]`.
        timesteps: How much of it, `[B]`.
        embeds: Text embeddings, `[B, 77, C]`.
        pooled: Pooled text embeddings, `[B, P]`.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    embeds: Tensor
    pooled: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def add_adapter(unet: UNet2DConditionModel, config: LoraRecipeConfig) -> None:
    """Freeze the UNet and add a LoRA that changes nothing yet; the same one for the same seed."""
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=list(TARGET_MODULES),
                init_lora_weights="gaussian",
            ),
            adapter_name=ADAPTER,
        )


def adapter_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    return {name: tensor.detach().float().cpu() for name, tensor in state.items()}


def train(
    unet: UNet2DConditionModel,
    cache: Cache,
    names: Sequence[str],
    scheduler: DDPMScheduler,
    config: LoraRecipeConfig,
    *,
    native_size: int,
    start: Checkpoint | None,
    on_step: Callable[[StepReport], None],
    on_checkpoint: Callable[[Checkpoint], None],
    stopped: Callable[[], bool],
) -> Checkpoint:
    """Train the adapter that `add_adapter` added, and return where the run ended.

    Under torch.distributed every rank calls it; batches are shared out and gradients averaged.

    Args:
        unet: With the adapter.
        cache: The examples.
        names: Their file names, for errors.
        scheduler: Noise schedule and prediction type of the base.
        config: The recipe's configuration.
        native_size: Side of the images that the base was trained for, pixels.
        start: Where to go on from; None for the beginning.
        on_step: Told of each step.
        on_checkpoint: Given what to keep, on each rank, between steps.
        stopped: Whether to end; asked before each step.

    Raises:
        CancelledError: `stopped` said so on some rank.
        ToileError: The loss is not finite (`TRAINING_DIVERGED`).
    """
    rank, world_size = _place()
    device = unet.device
    parameters = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(config, list(parameters.values()))
    losses: list[float] = []
    first = 0
    if start is not None:
        first, losses = start.step, list(start.losses)
        to_parameters(parameters, start.weights)
        restore_optimizer(optimizer, start.optimizer)
    model: nn.Module = unet.train()
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(unet)
    time_ids = torch.tensor([[native_size, native_size, 0, 0, native_size, native_size]])
    time_ids = time_ids.to(device=device, dtype=torch.float32)
    pace = _Pace(config)
    for step in range(first, config.steps):
        _agree_to_go_on(stopped(), world_size)
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = batch_indices(len(cache), config.batch_size, step, config.seed)
        batch = make_batch(cache, indices, config, step, scheduler, rank, world_size).to(device)
        share = _loss_sum(model, batch, scheduler, config, time_ids) / config.batch_size
        optimizer.zero_grad(set_to_none=True)
        (share * world_size).backward()  # type: ignore[no-untyped-call]  # DDP divides by it
        norm = nn.utils.clip_grad_norm_(parameters.values(), _CLIP_NORM)
        loss = _over_ranks(share.detach(), world_size)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise _diverged(step + 1, [names[index] for index in indices])
        optimizer.step()
        losses.append(loss)
        on_step(pace.report(step + 1, smoothed(losses), rate))
        if (step + 1) % config.checkpoint_interval_steps == 0 and step + 1 < config.steps:
            on_checkpoint(_checkpoint(step + 1, parameters, optimizer, losses))
    unet.eval()
    return _checkpoint(config.steps, parameters, optimizer, losses)


def make_batch(
    cache: Cache,
    indices: Sequence[int],
    config: LoraRecipeConfig,
    step: int,
    scheduler: DDPMScheduler,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Draw this rank's share of a step; each image's draws are its own, whichever rank has it."""
    latents: list[Tensor] = []
    noises: list[Tensor] = []
    timesteps: list[int] = []
    captions: list[int] = []
    for place in range(rank, len(indices), world_size):
        index = indices[place]
        source = generator(config.seed, step, place)
        mean, deviation = cache.means[index], cache.deviations[index]
        latents.append(mean + deviation * torch.randn(mean.shape, generator=source))
        noise = torch.randn(mean.shape, generator=source)
        total = int(scheduler.config.num_train_timesteps)
        timesteps.append(int(torch.randint(total, (1,), generator=source)))
        dropped = float(torch.rand(1, generator=source)) < config.caption_dropout
        captions.append(0 if dropped else int(cache.captions[index]))
        # Last, so that the other draws do not depend on whether there is an offset.
        noises.append(offset_noise(noise, config.noise_offset, source))
    return Batch(
        latents=torch.stack(latents),
        noise=torch.stack(noises),
        timesteps=torch.tensor(timesteps),
        embeds=cache.embeds[captions],
        pooled=cache.pooled[captions],
    )


def smoothed(losses: Sequence[float]) -> float:
    """Mean of the last losses."""
    last = losses[-SMOOTHING_STEPS:]
    return sum(last) / len(last)


def _loss_sum(
    model: nn.Module,
    batch: Batch,
    scheduler: DDPMScheduler,
    config: LoraRecipeConfig,
    time_ids: Tensor,
) -> Tensor:
    """Weighted errors, meant over each image and summed over this rank's images."""
    noised = add_noise(scheduler, batch.latents, batch.noise, batch.timesteps)
    target = prediction_target(scheduler, batch.latents, batch.noise, batch.timesteps)
    conditions = {"text_embeds": batch.pooled, "time_ids": time_ids.expand(len(noised), -1)}
    with _half_precision(noised.device):
        predicted = model(
            noised,
            batch.timesteps,
            encoder_hidden_states=batch.embeds,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
    errors = squared_or_huber(predicted.float() - target, config.huber_c).flatten(1).mean(dim=1)
    if config.min_snr_gamma:
        errors = errors * min_snr_weights(scheduler, batch.timesteps, config.min_snr_gamma)
    total: Tensor = errors.sum()
    return total


class _Pace:
    """How fast the last steps went; the first step of a process warms up and seldom counts."""

    def __init__(self, config: LoraRecipeConfig) -> None:
        self._config = config
        self._ends = deque([time.monotonic()], maxlen=SMOOTHING_STEPS + 1)

    def report(self, step: int, loss: float, rate: float) -> StepReport:
        self._ends.append(time.monotonic())
        counted = list(self._ends)[1:] if len(self._ends) > 2 else list(self._ends)
        seconds_per_step = max((counted[-1] - counted[0]) / (len(counted) - 1), 1e-9)
        return StepReport(
            step=step,
            total_steps=self._config.steps,
            loss=loss,
            learning_rate=rate,
            images_per_second=self._config.batch_size / seconds_per_step,
            seconds_left=seconds_per_step * (self._config.steps - step),
        )


@contextlib.contextmanager
def _half_precision(device: torch.device) -> Iterator[None]:
    """bf16 autocast where the hardware computes in it."""
    enabled = device.type != "cpu" or cpu_has_bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        yield


def _place() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _agree_to_go_on(stop: bool, world_size: int) -> None:
    """Stop on all ranks in the same step, or the others would wait for this one forever."""
    if _over_ranks(torch.tensor(float(stop)), world_size):
        raise CancelledError("the run was stopped")


def _over_ranks(value: Tensor, world_size: int) -> float:
    if world_size > 1:
        dist.all_reduce(value)
    return float(value)


def _checkpoint(
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights={name: parameter.detach().cpu() for name, parameter in parameters.items()},
        optimizer=optimizer_state(optimizer),
        losses=list(losses),
    )


def _diverged(step: int, names: Sequence[str]) -> ToileError:
    return ToileError(
        f"the loss stopped being finite at step {step}, on {', '.join(names)}; "
        "try a lower learning rate",
        reason="TRAINING_DIVERGED",
        metadata={"step": str(step)},
    )
