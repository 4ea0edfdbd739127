"""All that changes in a run, as a checkpoint and back."""

from collections.abc import Mapping

from torch import Tensor, nn

from toile.training.checkpoint import Checkpoint
from toile.training.config import LoraRecipeConfig
from toile.training.ema import MovingAverage, to_parameters
from toile.training.optimizers import make_optimizer, optimizer_state, restore_optimizer


class RunState:
    """A run between two steps.

    Attributes:
        step: Steps done.
        parameters: What is trained, by name.
        optimizer: Its optimizer.
        average: Moving average of the parameters; None if none is wanted.
        losses: Loss of every step done.
    """

    def __init__(self, network: nn.Module, config: LoraRecipeConfig) -> None:
        self.step = 0
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(config, list(self.parameters.values()))
        self.average: MovingAverage | None = None
        if config.ema_decay:
            self.average = MovingAverage(self.parameters, config.ema_decay)
        self.losses: list[float] = []

    def restore(self, start: Checkpoint) -> None:
        """Go on from a checkpoint of a run of the same configuration."""
        self.step = start.step
        self.losses = list(start.losses)
        to_parameters(self.parameters, start.weights)
        restore_optimizer(self.optimizer, start.optimizer)
        if self.average is not None:
            self.average.restore(start.average)

    def advance(self, rate: float, loss: float) -> None:
        """Take a step with the gradients that the parameters have."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.step)
        self.losses.append(loss)
        self.step += 1

    def published(self) -> Mapping[str, Tensor]:
        """The weights that the run would publish now."""
        return self.parameters if self.average is None else self.average.weights

    def checkpoint(self) -> Checkpoint:
        """A copy of the run."""
        return Checkpoint(
            step=self.step,
            weights=_copied(self.parameters),
            optimizer={
                place: _copied(state) for place, state in optimizer_state(self.optimizer).items()
            },
            losses=list(self.losses),
            average=_copied({} if self.average is None else self.average.weights),
        )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
