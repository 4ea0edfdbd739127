"""All that changes in a run, as a checkpoint and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from toile.training.batches import compute_dtype
from toile.training.checkpoint import Checkpoint
from toile.training.config import RecipeConfig
from toile.training.ema import MovingAverage, to_parameters
from toile.training.judging import ImageScores, best_judged
from toile.training.optimizers import (
    adapted_rate,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
    set_rate,
)
from toile.training.texts import TEXT_ENCODER
from toile.training.validation import best_step


class RunState:
    """A run between two steps.

    Attributes:
        step: Steps done.
        parameters: What is trained, by name.
        optimizer: Its optimizer.
        average: Moving average of the parameters; None if none is wanted.
        losses: Loss of every step done.
        validations: Loss of every validation, by its step.
        judgements: Scores of every set of samples that was judged, by its step.
        best: What the run would have published at the best validation, or the best samples, as
            the configuration says; empty before the first.
        scaler: Scales the loss of an fp16 run, whose gradients would vanish; of others by 1.
        skipped: Steps that changed no weights, for their gradients overflowed.
    """

    def __init__(self, network: nn.Module, config: RecipeConfig) -> None:
        self._publishes = config.publish_weights
        self.step = 0
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        of_text = {n: p for n, p in self.parameters.items() if n.startswith(TEXT_ENCODER)}
        others = [p for n, p in self.parameters.items() if n not in of_text]
        self.optimizer = make_optimizer(config, others, list(of_text.values()))
        self.average: MovingAverage | None = None
        if config.ema_decay:
            self.average = MovingAverage(self.parameters, config.ema_decay)
        self.losses: list[float] = []
        self.validations: dict[int, float] = {}
        self.judgements: dict[int, Sequence[ImageScores]] = {}
        self.best: dict[str, Tensor] = {}
        self.skipped: list[int] = []
        device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=compute_dtype(config, device) is torch.float16
        )

    def restore(self, start: Checkpoint) -> None:
        """Go on from a checkpoint of a run of the same configuration."""
        self.step = start.step
        self.losses = list(start.losses)
        self.validations = dict(start.validations)
        self.judgements = dict(start.judgements)
        self.best = dict(start.best)
        self.skipped = list(start.skipped)
        if start.scaler:
            self.scaler.load_state_dict(dict(start.scaler))
        to_parameters(self.parameters, start.weights)
        restore_optimizer(self.optimizer, start.optimizer)
        if self.average is not None:
            self.average.restore(start.average)

    def advance(self, rate: float, loss: float, *, overflowed: bool = False) -> float:
        """Take a step with the gradients that the parameters have, which `scaler` unscaled.

        Args:
            rate: The schedule's.
            loss: The step's.
            overflowed: Whether the gradients cannot be used: the step changes no weights.

        Returns:
            The rate that the step was taken at, which Prodigy adapts.
        """
        set_rate(self.optimizer, rate)
        taken_at = adapted_rate(self.optimizer)
        if overflowed:
            self.skipped.append(self.step + 1)
        else:
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.step)
        self.scaler.update()
        self.losses.append(loss)
        self.step += 1
        return taken_at

    def validated(self, loss: float) -> None:
        """Take note of a validation of `current()`."""
        self.validations[self.step] = loss
        if self._publishes == "best_validation" and best_step(self.validations) == self.step:
            self.best = _copied(self.current())

    def judged(self, scores: Sequence[ImageScores]) -> None:
        """Take note of the scores of samples that were drawn with `current()`."""
        self.judgements[self.step] = scores
        if self._publishes == "best_samples" and best_judged(self.judgements) == self.step:
            self.best = _copied(self.current())

    def current(self) -> Mapping[str, Tensor]:
        """The weights to judge the run by: the moving average, if one is kept."""
        return self.parameters if self.average is None else self.average.weights

    def published(self) -> Mapping[str, Tensor]:
        """The weights to publish: the best, if there was something to choose them by."""
        return self.best or self.current()

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
            validations=dict(self.validations),
            judgements=dict(self.judgements),
            best=self.best,
            scaler=self.scaler.state_dict(),
            skipped=list(self.skipped),
        )


def published_step(end: Checkpoint, config: RecipeConfig) -> int:
    """The step whose weights are published of a run that ended so."""
    best = {
        "best_validation": best_step(end.validations),
        "best_samples": best_judged(end.judgements),
        "last": 0,
    }
    return best[config.publish_weights] or end.step


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
