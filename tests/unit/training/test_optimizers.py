"""What the optimizers do to a parameter, and what they remember."""

import copy
import math

import pytest
import torch
from torch import nn

from toile.core.errors import FailedPreconditionError
from toile.training.config import LoraRecipeConfig
from toile.training.optimizers import (
    SHARED,
    adapted_rate,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)


def steps(
    config: LoraRecipeConfig, parameter: nn.Parameter, first: int, last: int, state: object = None
) -> dict[int, dict[str, torch.Tensor]]:
    optimizer = make_optimizer(config, [parameter])
    if state is not None:
        restore_optimizer(optimizer, state)  # type: ignore[arg-type]
    for step in range(first, last):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return copy.deepcopy(optimizer_state(optimizer))


def test_adamw_follows_its_paper() -> None:
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2."""
    config = LoraRecipeConfig(learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9)
    parameter = nn.Parameter(torch.ones(3))
    steps(config, parameter, 0, 3)
    value, mean, square = torch.ones(3), torch.zeros(3), torch.zeros(3)
    for step in range(3):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(step))
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        update = (mean / (1 - 0.8 ** (step + 1))) / (
            (square / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8
        )
        value = value - 0.01 * update - 0.01 * 0.1 * value
    torch.testing.assert_close(parameter.data, value)


def test_the_8_bit_adamw_follows_adamw_in_a_quarter_of_the_memory() -> None:
    """Dettmers et al., 2022: a byte for each mean and mean square, and one scale for 256."""
    pytest.importorskip("bitsandbytes", reason="the adamw8bit extra is not installed")
    exact, rounded = nn.Parameter(torch.ones(64, 96)), nn.Parameter(torch.ones(64, 96))
    values = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_beta2": 0.99}
    whole = steps(LoraRecipeConfig(**values), exact, 0, 20)
    state = steps(LoraRecipeConfig(**values, optimizer="adamw8bit"), rounded, 0, 20)
    change, error = (exact.detach() - 1.0).norm(), (exact - rounded).detach().norm()
    assert float(change) > 1.0
    assert 0.0 < float(error) < 0.05 * float(change)
    kept = {name: tensor for name, tensor in state[0].items() if tensor.numel() > 256}
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "state1": torch.uint8,
        "state2": torch.uint8,
    }
    full_bytes, less_bytes = (
        sum(tensor.nbytes for tensor in of.values()) for of in (whole[0], state[0])
    )
    assert less_bytes < 0.35 * full_bytes, "tables and scales of one parameter included"


def test_without_its_package_the_8_bit_adamw_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FailedPreconditionError, match="bitsandbytes") as caught:
        make_optimizer(LoraRecipeConfig(optimizer="adamw8bit"), [nn.Parameter(torch.ones(3))])
    assert caught.value.reason == "OPTIMIZER_NOT_INSTALLED"
    assert caught.value.metadata["field"] == "lora.optimizer"


def test_adafactor_follows_its_paper() -> None:
    """Shazeer and Stern, 2018, algorithm 4, with the rate from outside; one step of a matrix."""
    config = LoraRecipeConfig(learning_rate=0.01, weight_decay=0.0, optimizer="adafactor")
    parameter = nn.Parameter(torch.zeros(3, 4))
    state = steps(config, parameter, 0, 1)
    square = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) ** 2 + 1e-30
    rows, columns = square.mean(dim=1), square.mean(dim=0)
    second = torch.outer(rows, columns) / rows.mean()
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    update = gradient / second.sqrt()
    update = update / max(1.0, float(update.pow(2).mean().sqrt()))
    torch.testing.assert_close(parameter.data, -0.01 * update)
    assert state[0]["exp_avg_sq_row"].shape == (3,), "rows and columns, not the matrix"


def test_prodigy_follows_its_paper() -> None:
    """Mishchenko and Defazio, 2023, algorithm 4; the safeguard leaves the rate out of s."""
    config = LoraRecipeConfig.checked({"optimizer": "prodigy", "weight_decay": 0.1})
    parameter = nn.Parameter(torch.ones(3))
    state = steps(config, parameter, 0, 4)
    value, mean, square, s = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(3)
    d, r, memory = 1e-6, 0.0, math.sqrt(0.999)
    for step in range(4):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(step))
        rate = d * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        mean = 0.9 * mean + 0.1 * d * gradient
        square = 0.999 * square + 0.001 * d**2 * gradient**2
        # Both by the first d, which the package divides them by.
        r = memory * r + d * rate / 1e-6 * float(torch.dot(gradient, torch.ones(3) - value))
        s = memory * s + d * d / 1e-6 * gradient
        d = max(d, r / float(s.abs().sum()))
        value = value - rate * mean / (square.sqrt() + d * 1e-8) - rate * 0.1 * value
    torch.testing.assert_close(parameter.data, value, rtol=1e-6, atol=1e-7)
    assert float(state[SHARED]["d"]) == pytest.approx(d)


def test_prodigy_finds_a_rate_and_says_so() -> None:
    """Far from the goal, and pulled the same way again and again, it goes faster."""
    config = LoraRecipeConfig.checked({"optimizer": "prodigy", "weight_decay": 0.0})
    parameter = nn.Parameter(torch.full((4,), 3.0))
    optimizer = make_optimizer(config, [parameter])
    assert adapted_rate(optimizer) == 1e-6
    for _ in range(60):
        parameter.grad = 2.0 * parameter.detach()
        optimizer.step()
    assert adapted_rate(optimizer) > 1e-3
    assert float(parameter.detach().abs().max()) < 3.0
    optimizer.param_groups[0]["lr"] = 0.5
    assert adapted_rate(optimizer) == 0.5 * optimizer.param_groups[0]["d"]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "prodigy"])
@pytest.mark.parametrize("shape", [(3, 4), (64, 96)], ids=["small", "large"])
def test_state_goes_on_where_it_was_taken(name: str, shape: tuple[int, int]) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="the adamw8bit extra is not installed")
    config = LoraRecipeConfig.checked({"optimizer": name})
    whole, halves = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    end = steps(config, whole, 0, 6)
    middle = steps(config, halves, 0, 3)
    again = steps(config, halves, 3, 6, middle)
    assert torch.equal(whole, halves)
    assert end.keys() == again.keys()
    for place, remembered in end.items():
        assert all(torch.equal(tensor, again[place][name]) for name, tensor in remembered.items())
