"""Optimizers by name, and their state as tensors and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn
from transformers.optimization import Adafactor

from toile.training.checks import check_installed
from toile.training.config import RecipeConfig

State = Mapping[int, Mapping[str, Tensor]]
"""State of each parameter, by its place: `{0: {"exp_avg": …}}`; Prodigy's own is at `SHARED`."""

SHARED = -1
"""Place of what an optimizer remembers of all parameters together."""

_SHARE = "rate_share"
"""In a group of parameters: its rate over the rate that is set."""

_PRODIGY_REMEMBERS = ("d", "d_max", "d_numerator", "k")
"""Of its groups; what else is there is configuration, or written before it is read."""


def make_optimizer(
    config: RecipeConfig,
    parameters: Sequence[nn.Parameter],
    text_parameters: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer that the configuration names; its rates are set before each step.

    Those of text encoders are a group of their own, and go by their own rate.

    Adafactor is Shazeer and Stern's "Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost", 2018, as in transformers, with the rate of the schedule and not one of its own.

    Prodigy is Mishchenko and Defazio's "Prodigy: An Expeditiously Adaptive Parameter-Free
    Learner", 2023, with what its README recommends for diffusion models: bias correction, and a
    safeguard for the warm-up.

    The 8-bit AdamW is Dettmers et al.'s "8-bit Optimizers via Block-wise Quantization", 2022, by
    bitsandbytes: means and mean squares take a byte a number, but for parameters of fewer than
    4,096 numbers.

    Raises:
        FailedPreconditionError: bitsandbytes is not installed (`OPTIMIZER_NOT_INSTALLED`).
    """
    shares = [(parameters, 1.0), (text_parameters, config.text_rate_share)]
    groups: list[dict[str, Any]] = [
        # The decay is here and not given beside, for Prodigy prints what is.
        {"params": list(members), "weight_decay": config.weight_decay, _SHARE: share}
        for members, share in shares
        if members
    ]
    if config.optimizer == "adamw8bit":
        check_installed(config)
        from bitsandbytes.optim import AdamW8bit  # an extra

        return AdamW8bit(  # type: ignore[no-any-return]
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
        )
    if config.optimizer == "prodigy":
        return Prodigy(  # type: ignore[no-any-return]
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    if config.optimizer == "adafactor":
        return Adafactor(  # type: ignore[no-any-return]
            groups,
            lr=config.learning_rate,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step; text encoders take their share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_SHARE]


def adapted_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that the next step is taken at: what was set, times what Prodigy has found.

    It is that of the first group, which is not the text encoders'.
    """
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Everything that the optimizer remembers, counts of steps too."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Not from `state_dict`, in which bitsandbytes wraps what it has.
    found = {
        place: {name: torch.as_tensor(value) for name, value in optimizer.state[parameter].items()}
        for place, parameter in enumerate(parameters)
        if optimizer.state.get(parameter)
    }
    if isinstance(optimizer, Prodigy):
        group = optimizer.param_groups[0]  # all have the same
        # As Python computes them: rounded to single precision, a run would not go on exactly.
        found[SHARED] = {
            name: torch.tensor(group[name], dtype=torch.float64) for name in _PRODIGY_REMEMBERS
        }
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give an optimizer the state that `optimizer_state` took."""
    loaded = {
        place: {name: _as_it_was(value) for name, value in remembered.items()}
        for place, remembered in state.items()
        if place != SHARED
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
    shared = state.get(SHARED, {})
    for group in optimizer.param_groups:
        group.update({name: value.item() for name, value in shared.items()})


def _as_it_was(value: Tensor) -> Tensor | int:
    """A copy; counts of steps that were numbers, Adafactor's and the 8-bit AdamW's, are again."""
    is_number = value.ndim == 0 and value.dtype == torch.int64
    return int(value) if is_number else value.clone()
