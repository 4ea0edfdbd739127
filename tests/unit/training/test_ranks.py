"""Two processes train what one trains."""

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from toile.training import batches
from toile.training.checkpoint import Checkpoint
from toile.training.config import ControlNetRecipeConfig, LoraRecipeConfig
from unit.training.runs import (
    CLASS_CONFIG,
    CONFIG,
    CONTROL_CONFIG,
    TEXT_CONFIG,
    Run,
    base_scheduler,
    cache_for,
    run_as_rank,
    sample_as_rank,
    small_unet,
    stop_as_rank,
)

EVERYTHING = {
    "batch_size": 5,
    "steps": 3,
    "learning_rate": 1e-4,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "validation_share": 0.25,
    "validation_interval_steps": 2,
}


@pytest.mark.integration  # two more processes import torch
@pytest.mark.parametrize(
    ("recipe", "deviation"),
    [
        (CONFIG.model_copy(update={"dropout": 0.3}), 1e-6),
        (CLASS_CONFIG, 1e-6),
        (TEXT_CONFIG.model_copy(update={"text_encoder_learning_rate": 5e-5}), 1e-6),
        # Behind convolutions that start at zero, gradients are of the size of Adam's epsilon, 1e-8,
        # and Adam makes a part of the learning rate, 1e-4, of their rounding.
        (CONTROL_CONFIG, 1e-5),
    ],
    ids=["lora", "class images", "text encoders", "controlnet"],
)
def test_two_ranks_train_and_validate_as_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: LoraRecipeConfig | ControlNetRecipeConfig,
    deviation: float,
) -> None:
    config = recipe.model_copy(update=EVERYTHING)
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)
    one = Run(small_unet(), cache_for(config), base_scheduler(), config).end
    multiprocessing.spawn(run_as_rank, (2, config, tmp_path), nprocs=2)
    first, second = (Checkpoint.from_folder(tmp_path / str(rank)) for rank in (0, 1))
    assert first.to_files() == second.to_files()
    assert first.losses == pytest.approx(one.losses, abs=1e-6)
    assert first.validations.keys() == {2, 3}
    assert first.validations == pytest.approx(one.validations, abs=1e-6)
    for kind in ("weights", "average", "best"):
        for name, tensor in getattr(one, kind).items():
            got = getattr(first, kind)[name]
            torch.testing.assert_close(got, tensor, atol=deviation, rtol=0.0)


@pytest.mark.integration  # two more processes import torch
def test_ranks_stop_together_once_the_leader_has_kept_where_they_were(tmp_path: Path) -> None:
    multiprocessing.spawn(stop_as_rank, (2, tmp_path), nprocs=2)
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.integration  # two more processes import torch
def test_samples_may_take_longer_than_ranks_wait_for_each_other(tmp_path: Path) -> None:
    multiprocessing.spawn(sample_as_rank, (2, tmp_path, 6.0), nprocs=2)
    assert [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)] == ["[2]", "[]"]
