"""The loop that every recipe's network is trained in: a plain function over torch."""

import contextlib
import itertools
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from toile.core.errors import CancelledError, ToileError
from toile.core.jobs.samples import SampleSet
from toile.training.checkpoint import Checkpoint
from toile.training.checks import hold_out
from toile.training.config import RecipeConfig
from toile.training.dropout import ImageDropout, image_dropouts
from toile.training.ema import replaced, to_parameters
from toile.training.judging import best_judged
from toile.training.objective import B, Objective
from toile.training.ranks import led, on_some_rank, over_ranks, place, wait_for_all
from toile.training.schedules import learning_rate
from toile.training.state import RunState
from toile.training.validation import is_exhausted

SMOOTHING_STEPS = 25
_CLIP_NORM = 1.0
_NAMED_CHARACTERS = 700
"""Of an error's images: a job keeps a thousand characters of its message."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What is known after a step.

    Attributes:
        step: Steps done.
        total_steps: Of the run.
        loss: Mean of the last steps'.
        step_loss: Of this step alone.
        learning_rate: What the step was taken at.
        images_per_second: Over the last steps.
        seconds_left: To the last step, at that speed.
        validation_loss: Where the step was validated.
        skipped: Whether it changed no weights, for its fp16 gradients overflowed.
    """

    step: int
    total_steps: int
    loss: float
    step_loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    validation_loss: float | None = None
    skipped: bool = False


class Samples(Protocol):
    """Draws samples of a run, with the weights that its network has when it is asked to."""

    def wanted(self) -> bool:
        """Whether somebody seems to have asked for samples; cheap."""
        ...

    def draw(self, step: int, *, due: bool) -> Generator[None, None, SampleSet | None]:
        """Draw those of a step, piece by piece; None where nobody asked, or the run is to stop."""
        ...

    def tell(self, drawn: SampleSet, best_step: int) -> None:
        """Tell of what was drawn, and at which step the best so far was; 0 if none was judged."""
        ...


def train(
    network: nn.Module,
    objective: Objective[B],
    names: Sequence[str],
    config: RecipeConfig,
    *,
    start: Checkpoint | None,
    repeats: Sequence[int] | None = None,
    on_step: Callable[[StepReport], None],
    on_checkpoint: Callable[[Checkpoint], None],
    stopped: Callable[[], bool],
    samples: Samples | None = None,
) -> Checkpoint:
    """Train what a network has to train, and return where the run ended.

    The network is left with the weights to publish: their moving average, if one is kept, and
    those of the best validation or the best samples, if there are any.

    Under torch.distributed every rank calls it; batches are shared out and gradients averaged.

    Args:
        network: What requires gradients of it is trained.
        objective: The examples, and what is to be learned of them.
        names: File names of the dataset's, which say who is held out, and which errors name.
        config: The recipe's configuration.
        start: Where to go on from; None for the beginning.
        repeats: How often an epoch shows each of the dataset's; once if None.
        on_step: Told of each step.
        on_checkpoint: Given what to keep, on each rank, between steps and when it is stopped.
        stopped: Whether to end; asked before each step.
        samples: Draws samples between steps; of the leading rank, None on the others.

    Raises:
        CancelledError: `stopped` said so on some rank.
        FailedPreconditionError: There are too few examples to hold some out.
        ToileError: The loss is not finite (`TRAINING_DIVERGED`).
    """
    rank, world_size = place()
    state = RunState(network, config)
    device = next(iter(state.parameters.values())).device
    if start is not None:
        state.restore(start)
    model = network.train()
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(network)
    pace = _Pace(config)
    chosen, held_out = hold_out(names, config.validation_share, recipe=config.RECIPE)
    shown = [index for index in chosen for _ in range(repeats[index] if repeats else 1)]
    order, validation_loss_of = objective.order(shown), objective.validation(held_out)
    dropouts = image_dropouts(network)
    while True:
        ended = state.step == config.steps or _should_end_early(state, config)
        wanted = samples is not None and samples.wanted()
        told_to_stop, wanted = on_some_rank((stopped(), wanted), device)
        if told_to_stop and not ended:
            if state.step:
                on_checkpoint(state.checkpoint())
            wait_for_all()  # nobody records the stop before the leader has kept where it was
            raise CancelledError("the run was stopped")
        due = _samples_are_due(state, config, ended=ended)
        if state.step and (due or wanted):
            with pace.paused():
                _draw(samples, state, network, due=due)
            if not ended and on_some_rank((stopped(), False), device)[0]:
                continue  # the next attempt draws what this one could not
        if ended:
            break
        step = state.step
        indices = order(step)
        batch = objective.batch(indices, step, rank, world_size).to(device)
        state.optimizer.zero_grad(set_to_none=True)
        for dropout in dropouts:
            dropout.step = step
        loss = over_ranks(_backward(model, objective, batch, config, dropouts, state.scaler))
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.parameters.values(), _CLIP_NORM)
        overflowed = not math.isfinite(float(norm))
        # Gradients of a loss that is scaled up may overflow where nothing is wrong with it.
        if not math.isfinite(loss) or (overflowed and state.scaler.get_scale() <= 1.0):
            raise _diverged(step + 1, indices, names)
        rate = state.advance(learning_rate(config, step), loss, overflowed=overflowed)
        if held_out and _is_due(state.step, config):
            network.eval()
            with replaced(state.parameters, state.current()):
                validation_loss = validation_loss_of(network, device)
            network.train()
            if not math.isfinite(validation_loss):
                raise _diverged(state.step, held_out, names)
            state.validated(validation_loss)
        on_step(pace.report(state, rate))
        if state.step % config.checkpoint_interval_steps == 0 and state.step < config.steps:
            on_checkpoint(state.checkpoint())
    network.eval()
    end = state.checkpoint()
    to_parameters(state.parameters, state.published())
    return end


def _draw(samples: Samples | None, state: RunState, network: nn.Module, *, due: bool) -> None:
    """Draw samples with the weights to judge the run by, on the leading rank.

    It alone learns of their scores, for it alone keeps checkpoints and publishes.
    """
    device = next(iter(state.parameters.values())).device
    network.eval()
    with replaced(state.parameters, state.current()):
        drawn = led(samples.draw(state.step, due=due) if samples is not None else None, device)
    network.train()
    if samples is None or drawn is None:
        return
    if drawn.is_judged:
        state.judged([sample.scores for sample in drawn.samples])
    samples.tell(drawn, best_judged(state.judgements))


def _backward(
    model: nn.Module,
    objective: Objective[B],
    batch: B,
    config: RecipeConfig,
    dropouts: Sequence[ImageDropout],
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Add the step's gradients to the parameters; returns this rank's share of the loss.

    Piece by piece the sums are those of the whole batch, but for the order of adding.
    """
    rank, world_size = place()
    pieces = batch.pieces(config.gradient_accumulation_steps)
    places = iter(range(rank, len(batch) * world_size, world_size))
    total = torch.zeros((), device=next(model.parameters()).device)
    for number, piece in enumerate(pieces, start=1):
        last = number == len(pieces)
        mine = [next(places) for _ in range(len(piece))]
        for dropout in dropouts:
            dropout.places = mine
        with contextlib.nullcontext() if last else _without_exchange(model):
            share = objective.loss_sum(model, piece) / config.batch_size
            # DistributedDataParallel divides by the number of ranks.
            scaler.scale(share * world_size).backward()  # type: ignore[no-untyped-call]
        total += share.detach()
    return total


def _without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep gradients to this rank; the last piece's backward exchanges their sum."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _is_due(step: int, config: RecipeConfig) -> bool:
    """Whether to validate after a step; after the last one always."""
    return step % config.validation_interval_steps == 0 or step == config.steps


def _samples_are_due(state: RunState, config: RecipeConfig, *, ended: bool) -> bool:
    """Whether to draw samples after a step; after the last one of those that are drawn at all."""
    interval = config.sample_interval_steps
    return interval > 0 and (ended or state.step % interval == 0)


def _should_end_early(state: RunState, config: RecipeConfig) -> bool:
    return is_exhausted(state.validations, config.early_stopping_patience)


def smoothed(losses: Sequence[float]) -> float:
    """Mean of the last losses."""
    last = losses[-SMOOTHING_STEPS:]
    return sum(last) / len(last)


class _Pace:
    """How fast the last steps went; the first step of a process warms up and seldom counts."""

    def __init__(self, config: RecipeConfig) -> None:
        self._config = config
        self._ends = deque([time.monotonic()], maxlen=SMOOTHING_STEPS + 1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that a block takes out of account."""
        before = time.monotonic()
        yield
        away = time.monotonic() - before
        self._ends = deque((end + away for end in self._ends), maxlen=self._ends.maxlen)

    def report(self, state: RunState, rate: float) -> StepReport:
        self._ends.append(time.monotonic())
        counted = list(self._ends)[1:] if len(self._ends) > 2 else list(self._ends)
        seconds_per_step = max((counted[-1] - counted[0]) / (len(counted) - 1), 1e-9)
        return StepReport(
            step=state.step,
            total_steps=self._config.steps,
            loss=smoothed(state.losses),
            step_loss=state.losses[-1],
            learning_rate=rate,
            images_per_second=self._config.images_per_step / seconds_per_step,
            seconds_left=seconds_per_step * (self._config.steps - state.step),
            validation_loss=state.validations.get(state.step),
            skipped=state.step in state.skipped[-1:],
        )


def _diverged(step: int, indices: Sequence[int], names: Sequence[str]) -> ToileError:
    """The error of a step whose loss its images broke; all of them are logged."""
    shown = (names[i] if i < len(names) else f"class image {i - len(names)}" for i in indices)
    images = list(dict.fromkeys(shown))
    _log.error("the loss stopped being finite at step %d, on %s", step, ", ".join(images))
    lengths = itertools.accumulate(len(image) + 2 for image in images)
    told = images[: sum(length <= _NAMED_CHARACTERS for length in lengths)]
    if rest := len(images) - len(told):
        told.append(f"and {rest} more, which the job's log names")
    named = ", ".join(told)
    return ToileError(
        f"the loss stopped being finite at step {step}; try a lower learning rate, or leave out "
        f"what cannot be learned of the images of that step: {named}",
        reason="TRAINING_DIVERGED",
        metadata={"step": str(step), "images": json.dumps(images)},
    )
