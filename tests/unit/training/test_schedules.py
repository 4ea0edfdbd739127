"""Rates of steps, against transformers' own schedules."""

import pytest
import torch
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from toile.training.config import LoraRecipeConfig
from toile.training.schedules import learning_rate

STEPS, WARMUP = 100, 20


def rates(schedule: str, warmup: int | None = WARMUP) -> list[float]:
    config = LoraRecipeConfig(
        steps=STEPS, learning_rate=0.1, learning_rate_schedule=schedule, warmup_steps=warmup
    )
    return [learning_rate(config, step) for step in range(STEPS)]


def reference(schedule: str, warmup: int = WARMUP) -> list[float]:
    """What transformers gives; for steps 0 to STEPS."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "cosine": lambda: get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, STEPS, min_lr_rate=0.1
        ),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, STEPS),
    }[schedule]()
    found = []
    for _ in range(STEPS + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_rates_are_those_of_transformers(schedule: str) -> None:
    theirs = reference(schedule)
    # Theirs begins at 0, and their linear one ends there, where ours ends at a tenth.
    falling = [0.01 + 0.9 * r for r in theirs] if schedule == "linear" else theirs
    assert rates(schedule)[:WARMUP] == pytest.approx(theirs[1 : WARMUP + 1])
    assert rates(schedule)[WARMUP:] == pytest.approx(falling[WARMUP:STEPS])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_without_a_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    assert rates(schedule, warmup=0)[0] == 0.1


def test_unset_the_warm_up_is_a_twentieth() -> None:
    found = rates("cosine", warmup=None)
    assert found.index(max(found)) == 4
    assert max(found) == 0.1


def test_a_run_of_warm_up_alone_rises_to_its_end() -> None:
    found = rates("linear", warmup=STEPS)
    assert found == sorted(found)
    assert found[-1] == 0.1
