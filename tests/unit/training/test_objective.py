"""The loop trains what is neither diffusion nor a UNet: a classifier, by its own batches."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from toile.core.errors import CancelledError, ToileError
from toile.training import loop
from toile.training.checkpoint import Checkpoint
from toile.training.config import RecipeConfig
from toile.training.data import batch_indices, generator

NAMES = [f"{index}.png" for index in range(12)]


class ClassifierConfig(RecipeConfig):
    """Of the toy."""

    RECIPE: ClassVar[str] = "classifier"


CONFIG = ClassifierConfig(
    steps=12, batch_size=4, learning_rate=0.05, validation_share=0.2, validation_interval_steps=4
)


@dataclass(frozen=True)
class Labelled:
    """Points `[B, 2]` with a label each."""

    points: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(
            self, points=self.points.to(device), labels=self.labels.to(device)
        )

    def pieces(self, count: int) -> list[Self]:
        pairs = zip(self.points.chunk(count), self.labels.chunk(count), strict=True)
        return [dataclasses.replace(self, points=p, labels=label) for p, label in pairs]


class Sides:
    """Which side of a line a point is on; each step shakes the points a little."""

    def __init__(self, config: ClassifierConfig, *, broken: int = -1) -> None:
        source = torch.Generator().manual_seed(3)
        self._config = config
        self._points = torch.randn(len(NAMES), 2, generator=source)
        self._labels = (self._points.sum(dim=1) > 0).long()
        if broken >= 0:
            self._points[broken] = torch.nan

    def order(self, shown: Sequence[int]) -> Callable[[int], list[int]]:
        config = self._config

        def of(step: int) -> list[int]:
            places = batch_indices(len(shown), config.batch_size, step, config.seed)
            return [shown[place] for place in places]

        return of

    def batch(self, indices: Sequence[int], step: int, rank: int, world_size: int) -> Labelled:
        shaken = [
            self._points[indices[place]]
            + 0.1 * torch.randn(2, generator=generator(self._config.seed, step, place))
            for place in range(rank, len(indices), world_size)
        ]
        return Labelled(torch.stack(shaken), self._labels[indices[rank::world_size]])

    def loss_sum(self, network: nn.Module, batch: Labelled) -> Tensor:
        return nn.functional.cross_entropy(network(batch.points), batch.labels, reduction="sum")

    def validation(self, held_out: Sequence[int]) -> Callable[[nn.Module, torch.device], float]:
        whole = Labelled(self._points[list(held_out)], self._labels[list(held_out)])

        def loss(network: nn.Module, device: torch.device) -> float:
            with torch.no_grad():
                return float(self.loss_sum(network, whole.to(device))) / len(whole)

        return loss


class Training:
    """A run of it, and what it told."""

    def __init__(
        self,
        config: ClassifierConfig = CONFIG,
        *,
        start: Checkpoint | None = None,
        stop_at: int = -1,
        broken: int = -1,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.kept: list[Checkpoint] = []
        self.reports: list[loop.StepReport] = []
        self.stopped = False
        try:
            self.end = loop.train(
                self.network,
                Sides(config, broken=broken),
                NAMES,
                config,
                start=start,
                on_step=self.reports.append,
                on_checkpoint=self.kept.append,
                stopped=lambda: len(self.reports) == stop_at,
            )
        except CancelledError:
            self.stopped = True


def test_it_learns() -> None:
    long = Training(CONFIG.model_copy(update={"steps": 60}))
    assert long.reports[-1].loss < 0.5 * long.reports[0].loss
    assert min(long.end.validations.values()) < 0.5


def test_an_interrupted_run_ends_as_an_uninterrupted_one() -> None:
    whole = Training()
    first = Training(stop_at=5)
    assert first.stopped
    second = Training(start=first.kept[-1], stop_at=4)
    rest = Training(start=second.kept[-1])
    assert [report.step for report in rest.reports] == [10, 11, 12]
    assert rest.end.to_files() == whole.end.to_files()
    weights, again = whole.network.state_dict(), rest.network.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_two_pieces_are_one_batch() -> None:
    whole = Training()
    halves = Training(CONFIG.model_copy(update={"gradient_accumulation_steps": 2}))
    torch.testing.assert_close(halves.end.losses, whole.end.losses)
    for name, weights in whole.end.weights.items():
        torch.testing.assert_close(halves.end.weights[name], weights)


def test_a_loss_that_is_no_number_names_its_images() -> None:
    with pytest.raises(ToileError) as caught:
        Training(CONFIG.model_copy(update={"validation_share": 0.0}), broken=7)
    assert caught.value.reason == "TRAINING_DIVERGED"
    assert "7.png" in json.loads(caught.value.metadata["images"])
