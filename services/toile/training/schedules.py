"""The learning rate of each step, from the step's number alone."""

import math

from toile.training.config import RecipeConfig

_WARMUP_SHARE = 0.05
_FINAL_SHARE = 0.1  # of the peak, at the last step


def learning_rate(config: RecipeConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then the schedule.

    After the warm-up these are the curves of transformers' `get_constant_schedule_with_warmup`,
    and, falling to a tenth instead of nothing, of `get_cosine_schedule_with_warmup` and
    `get_linear_schedule_with_warmup`. The warm-up starts at its first share and not at 0: a step
    at rate 0 would learn nothing.
    """
    warmup = _warmup_steps(config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * _curve(config.learning_rate_schedule, done)


def _warmup_steps(config: RecipeConfig) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return max(1, round(config.steps * _WARMUP_SHARE))


def _curve(schedule: str, done: float) -> float:
    """Share of the peak when a share of the steps after the warm-up is done."""
    if schedule == "constant":
        return 1.0
    falling = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return _FINAL_SHARE + (1.0 - _FINAL_SHARE) * falling
