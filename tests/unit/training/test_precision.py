"""Half precision: what computes in it, what stays fp32, and gradients that overflow."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from toile.core.errors import ToileError
from toile.training import batches, controlnet, loop, lora
from toile.training.batches import compute_dtype
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint
from toile.training.config import ControlNetRecipeConfig, LoraRecipeConfig
from unit.training.runs import CONFIG, CONTROL_CONFIG, Run, cache_for

FP16 = CONFIG.model_copy(update={"mixed_precision": "fp16", "checkpoint_interval_steps": 1})
MakeUnet = Callable[[], UNet2DConditionModel]


@pytest.mark.parametrize(
    ("precision", "device", "has_bfloat16", "dtype"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("auto", "cuda", False, torch.bfloat16),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp16", "cpu", True, torch.float16),
        ("no", "cuda", True, torch.float32),
    ],
)
def test_what_is_computed_in(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    device: str,
    has_bfloat16: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: has_bfloat16)
    config = CONFIG.model_copy(update={"mixed_precision": precision})
    assert compute_dtype(config, torch.device(device)) is dtype


@pytest.mark.parametrize("recipe", [CONFIG, CONTROL_CONFIG], ids=["lora", "controlnet"])
def test_weights_that_are_held_as_they_are_cast_change_nothing(
    make_unet: MakeUnet,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
    recipe: LoraRecipeConfig | ControlNetRecipeConfig,
) -> None:
    config = recipe.model_copy(update={"mixed_precision": "bf16", "steps": 2})
    held = Run(make_unet(), cache_for(config), scheduler, config)
    types = {
        (type(module), parameter.dtype)
        for module in held.unet.modules()
        for parameter in module.parameters(recurse=False)
        if not parameter.requires_grad and module is not held.unet.conv_in
    }
    assert types == {
        (nn.Linear, torch.bfloat16),
        (nn.Conv2d, torch.bfloat16),
        (nn.GroupNorm, torch.float32),
        (nn.LayerNorm, torch.float32),
    }
    assert held.unet.dtype == torch.float32, "what pipelines draw in"
    trained = [p for p in held.network.parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    for module in (lora, controlnet):
        monkeypatch.setattr(module, "hold_frozen", lambda *_: None)
    cast = Run(make_unet(), cache_for(config), scheduler, config)
    assert held.end.to_files() == cast.end.to_files()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_about_the_same(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler, precision: str
) -> None:
    config = CONFIG.model_copy(update={"mixed_precision": precision})
    half = Run(make_unet(), cache, scheduler, config).end
    full = Run(
        make_unet(), cache, scheduler, config.model_copy(update={"mixed_precision": "no"})
    ).end
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.02)
    assert half.skipped == []


def test_gradients_that_overflow_cost_their_step_alone(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler, tmp_path: Path
) -> None:
    """Interrupted while it looks for a scale that does, a run goes on as if it had not been."""
    kept: dict[int, Checkpoint] = {}

    def keep(point: Checkpoint) -> None:
        folder = tmp_path / str(point.step)
        folder.mkdir(exist_ok=True)
        for name, content in point.to_files().items():
            (folder / name).write_bytes(content)
        kept[point.step] = Checkpoint.from_folder(folder)

    Run(make_unet(), cache, scheduler, FP16.model_copy(update={"steps": 2}), keep=keep)
    start = too_high(kept[1])
    whole = Run(make_unet(), cache, scheduler, FP16, start, keep=keep)
    skipped = whole.end.skipped
    assert skipped in ([2], [2, 3], [2, 3, 4])
    assert [report.step for report in whole.reports if report.skipped] == skipped
    for name, tensor in kept[1].weights.items():
        assert torch.equal(kept[skipped[-1]].weights[name], tensor)
        assert not torch.equal(whole.end.weights[name], tensor)
    assert whole.end.scaler["scale"] == start.scaler["scale"] / 2 ** len(skipped)
    for step in (2, 5):
        again = Run(make_unet(), cache, scheduler, FP16, kept[step]).end
        assert again.to_files() == whole.end.to_files()


def too_high(point: Checkpoint) -> Checkpoint:
    """The same, with a loss scale that has to be halved a time or two."""
    return dataclasses.replace(point, scaler={**point.scaler, "scale": 2.0**26})


def test_gradients_that_overflow_unscaled_end_the_run(
    make_unet: MakeUnet, cache: Cache, scheduler: DDPMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = loop._backward

    def overflow(model: nn.Module, *rest: object) -> torch.Tensor:
        loss = backward(model, *rest)  # type: ignore[arg-type]
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(loop, "_backward", overflow)
    with pytest.raises(ToileError) as caught:
        Run(make_unet(), cache, scheduler, FP16.model_copy(update={"steps": 30}))
    assert caught.value.reason == "TRAINING_DIVERGED"
    assert int(caught.value.metadata["step"]) == 17, "after a scale of 65536 was halved to 1"
    plain = FP16.model_copy(update={"mixed_precision": "no"})
    with pytest.raises(ToileError) as caught:
        Run(make_unet(), cache, scheduler, plain)
    assert int(caught.value.metadata["step"]) == 1
