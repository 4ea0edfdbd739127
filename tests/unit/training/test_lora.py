"""The loop: it learns, repeats itself exactly, and stops when it should."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.core.artifacts.local import LocalStore
from toile.core.errors import CancelledError, ToileError
from toile.diffusion.banked_unet import TARGETS, bank_layout
from toile.training import lora
from toile.training.batches import loss_sum, make_batch
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from toile.training.data import batch_indices
from unit.training.runs import CONFIG, Run


def loss_of(unet: UNet2DConditionModel, cache: Cache, scheduler: DDPMScheduler) -> float:
    """Loss on draws that no training step makes."""
    config = CONFIG.model_copy(update={"batch_size": 32, "caption_dropout": 0.0})
    batch = make_batch(cache, [i % 4 for i in range(32)], config, 10**6, scheduler)
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
    with torch.no_grad():
        return float(loss_sum(unet, batch, scheduler, config, time_ids))


def test_it_learns(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    # Bright latents, which a network that knows nothing does not expect.
    bright = dataclasses.replace(cache, means=torch.full_like(cache.means, 3.0))
    config = CONFIG.model_copy(update={"steps": 30, "learning_rate": 2e-2})
    untrained = loss_of(make_unet(), bright, scheduler)
    run = Run(make_unet(), bright, scheduler, config)
    assert loss_of(run.unet, bright, scheduler) < 0.98 * untrained


@pytest.mark.parametrize("targets", TARGETS)
def test_only_the_adapter_changes(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    targets: str,
) -> None:
    before = make_unet().state_dict()
    config = CONFIG.model_copy(update={"target_modules": targets})
    run = Run(make_unet(), cache, scheduler, config)
    after = {name.replace(".base_layer", ""): t for name, t in run.unet.state_dict().items()}
    assert all(torch.equal(t.to(after[name].dtype), after[name]) for name, t in before.items())
    state = lora.adapter_state(run.unet)
    layout = bank_layout(make_unet(), TARGETS[targets])
    assert {name.rsplit(".lora_", 1)[0] for name in state} == {
        path for group in layout.groups for path in group.targets
    }
    assert all(tensor.abs().sum() > 0 for tensor in state.values())


def test_a_dora_starts_as_the_base_and_trains_magnitudes(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    config = CONFIG.model_copy(update={"use_dora": True, "mixed_precision": "no"})
    untrained = make_unet()
    lora.add_adapter(untrained, config)
    assert abs(loss_of(untrained, cache, scheduler) - loss_of(make_unet(), cache, scheduler)) < 1e-4
    before = lora.adapter_state(untrained)
    after = lora.adapter_state(Run(make_unet(), cache, scheduler, config).unet)
    magnitudes = [name for name in before if name.endswith("lora_magnitude_vector")]
    assert 3 * len(magnitudes) == len(before)
    assert all(not torch.equal(before[name], after[name]) for name in magnitudes)


def test_interrupted_run_ends_as_an_uninterrupted_one(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path / "store")
    whole = Run(
        make_unet(), cache, scheduler, keep=lambda point: save_checkpoint(store, "points", point)
    )
    start = load_checkpoint(store, "points", tmp_path / "cache")
    assert start is not None
    rest = Run(make_unet(), cache, scheduler, start=start)
    assert [report.step for report in rest.reports] == [4, 5, 6]
    assert rest.end.losses == whole.end.losses
    assert rest.end.weights.keys() == whole.end.weights.keys()
    for name, tensor in whole.end.weights.items():
        assert torch.equal(tensor, rest.end.weights[name]), name


def test_stops_between_steps(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    kept: list[Checkpoint] = []
    with pytest.raises(CancelledError):
        Run(make_unet(), cache, scheduler, stop_at=2, keep=kept.append)
    assert [point.step for point in kept] == [2], "it can go on from where it stopped"
    with pytest.raises(CancelledError):
        Run(make_unet(), cache, scheduler, stop_at=0, keep=kept.append)
    assert len(kept) == 1, "nothing was done"


def test_divergence_names_the_step_and_the_images(
    make_unet: Callable[[], UNet2DConditionModel], cache: Cache, scheduler: DDPMScheduler
) -> None:
    cache.means[1] = float("nan")
    with pytest.raises(ToileError) as caught:
        Run(make_unet(), cache, scheduler)
    assert caught.value.reason == "TRAINING_DIVERGED"
    assert "b.png" in caught.value.message
    assert 1 <= int(caught.value.metadata["step"]) <= 2


def test_every_epoch_shows_every_image_once() -> None:
    shown = [i for step in range(6) for i in batch_indices(4, 2, step, seed=1)]
    assert [sorted(shown[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert shown != [i for step in range(6) for i in batch_indices(4, 2, step, seed=2)]


@pytest.mark.parametrize("noise_offset", [0.0, 0.1])
def test_ranks_share_a_batch(cache: Cache, scheduler: DDPMScheduler, noise_offset: float) -> None:
    config = CONFIG.model_copy(update={"batch_size": 3, "noise_offset": noise_offset})
    whole = make_batch(cache, [2, 0, 3], config, 5, scheduler)
    even = make_batch(cache, [2, 0, 3], config, 5, scheduler, rank=0, world_size=2)
    odd = make_batch(cache, [2, 0, 3], config, 5, scheduler, rank=1, world_size=2)
    for name, tensor in vars(whole).items():
        assert torch.equal(tensor[0::2], vars(even)[name])
        assert torch.equal(tensor[1::2], vars(odd)[name])


def test_offset_changes_the_noise_and_no_other_draw(cache: Cache, scheduler: DDPMScheduler) -> None:
    plain = make_batch(cache, [2, 0], CONFIG, 5, scheduler)
    offset = CONFIG.model_copy(update={"noise_offset": 0.1})
    moved = make_batch(cache, [2, 0], offset, 5, scheduler)
    differing = {name for name, t in vars(plain).items() if not torch.equal(t, vars(moved)[name])}
    assert differing == {"noise"}
    shift = moved.noise - plain.noise
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))


def test_dropped_captions_become_the_empty_one(cache: Cache, scheduler: DDPMScheduler) -> None:
    all_dropped = CONFIG.model_copy(update={"caption_dropout": 1.0})
    batch = make_batch(cache, [0, 1], all_dropped, 0, scheduler)
    assert torch.equal(batch.embeds, cache.embeds[[0, 0]])
    none_dropped = CONFIG.model_copy(update={"caption_dropout": 0.0})
    batch = make_batch(cache, [0, 1], none_dropped, 0, scheduler)
    assert torch.equal(batch.embeds, cache.embeds[[1, 2]])


def test_seed_makes_the_adapter(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    states = []
    for seed in (1, 1, 2):
        unet = make_unet()
        lora.add_adapter(unet, CONFIG.model_copy(update={"seed": seed}))
        states.append({n: p for n, p in unet.named_parameters() if "lora_A" in n})
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
