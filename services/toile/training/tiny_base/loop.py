"""The one optimisation loop of every stage: cosine rate, moving average, resumable checkpoints."""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from toile.training.tiny_base.config import StageConfig

_LOG = structlog.get_logger(__name__)
_LOG_EVERY_STEPS = 50

Loss = Callable[[int], Tensor]
Snapshot = Callable[[nn.Module, int], None]


def half_precision() -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where the CPU computes in it (AVX512-BF16 or AMX), else nothing."""
    native = bool(
        torch.cpu._is_avx512_bf16_supported()  # torch has no public question for it
    )
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native)


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * max(0.01, 0.5 * (1.0 + math.cos(math.pi * min(1.0, share))))


def workers() -> tuple[int, int]:
    """This process's rank and how many train together (torchrun starts several; else 0 of 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Averaged:
    """An exponential moving average of a network's parameters."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    def update(self, network: nn.Module, step: int) -> None:
        """Follow the network; early steps count more (as in diffusers' EMAModel)."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        mine = [parameter.data for parameter in self.network.parameters()]
        theirs = [parameter.data for parameter in network.parameters()]
        torch._foreach_lerp_(mine, theirs, 1.0 - decay)


def run_stage(
    name: str,
    network: nn.Module,
    loss: Loss,
    config: StageConfig,
    workdir: Path,
    *,
    checkpoint_seconds: float,
    snapshot: Snapshot | None = None,
) -> nn.Module:
    """Train `network` and give back its moving average.

    loss(step) computes the step's loss; all its randomness must come from the step number, so
    that a stage stopped at any moment goes on from its last checkpoint as if it had not stopped.
    snapshot(average, step) is called at each checkpoint.
    """
    folder = workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    average = Averaged(network, config.ema_decay)
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    step = _resume(folder, network, average, optimizer)
    leader = workers()[0] == 0
    network.train()
    mean_loss, started, saved, first = 0.0, time.monotonic(), time.monotonic(), step
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        # The fused attention's backward pass is several times slower at these small sizes.
        with half_precision(), sdpa_kernel(SDPBackend.MATH):
            value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        _average_gradients(network)
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        step += 1
        if leader:
            average.update(network, step)
        share = max(0.02, 1.0 / (step - first))
        mean_loss += share * (float(value.detach()) - mean_loss)
        if leader and step % _LOG_EVERY_STEPS == 0:
            pace = (time.monotonic() - started) / (step - first)
            _LOG.info(
                "tiny_base.step",
                stage=name,
                step=step,
                of=config.steps,
                loss=round(mean_loss, 5),
                seconds_per_step=round(pace, 3),
                eta_minutes=round(pace * (config.steps - step) / 60, 1),
            )
        due = time.monotonic() - saved > checkpoint_seconds or step == config.steps
        if leader and due:
            _save(folder, step, network, average, optimizer)
            if snapshot is not None:
                snapshot(average.network, step)
            saved = time.monotonic()
    return average.network


def _average_gradients(network: nn.Module) -> None:
    """The mean of all workers' gradients, in one exchange."""
    _, count = workers()
    if count == 1:
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= count
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def _save(
    folder: Path, step: int, network: nn.Module, average: Averaged, optimizer: torch.optim.AdamW
) -> None:
    tensors = {f"network.{name}": _plain(t) for name, t in network.state_dict().items()}
    tensors |= {f"average.{name}": _plain(t) for name, t in average.network.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, tensor in state.items():
            tensors[f"optimizer.{index}.{key}"] = _plain(tensor)
    save_file(tensors, folder / "checkpoint.part", metadata={"step": str(step)})
    (folder / "checkpoint.part").replace(folder / "checkpoint.safetensors")
    (folder / "progress.json").write_text(json.dumps({"step": step}), encoding="utf-8")


def _plain(tensor: Tensor) -> Tensor:
    """A copy in the memory layout that safetensors stores."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _resume(
    folder: Path, network: nn.Module, average: Averaged, optimizer: torch.optim.AdamW
) -> int:
    file = folder / "checkpoint.safetensors"
    if not file.exists():
        return 0
    tensors = load_file(file)
    network.load_state_dict(_under("network.", tensors))
    average.network.load_state_dict(_under("average.", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimizer.", tensors).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state})
    step = int(next(iter(state.values()))["step"].item()) if state else 0
    _LOG.info("tiny_base.resume", folder=folder.name, step=step)
    return step


def averaged_state(workdir: Path, name: str) -> dict[str, Tensor]:
    """The moving average a finished (or running) stage saved last.

    Raises:
        FileNotFoundError: the stage has saved nothing yet.
    """
    file = workdir / name / "checkpoint.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"stage {name!r} has not been run in {workdir}")
    return _under("average.", load_file(file))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
