"""Optimizers by name, and their state as tensors and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from toile.training.config import RecipeConfig

State = Mapping[int, Mapping[str, Tensor]]
"""State of each parameter, by its place: `{0: {"exp_avg": …}}`."""


def make_optimizer(
    config: RecipeConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that the configuration names; its rate is set before each step.

    Adafactor is Shazeer and Stern's "Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost", 2018, as in transformers, with the rate of the schedule and not one of its own.
    """
    if config.optimizer == "adafactor":
        return Adafactor(  # type: ignore[no-any-return]
            parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Everything that the optimizer remembers of each parameter, Adafactor's count of steps too."""
    state = optimizer.state_dict()["state"]
    return {
        place: {name: torch.as_tensor(value) for name, value in remembered.items()}
        for place, remembered in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give an optimizer the state that `optimizer_state` took."""
    loaded = {
        place: {name: value.clone() for name, value in remembered.items()}
        for place, remembered in state.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
