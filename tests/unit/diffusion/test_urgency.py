"""A drawing ends at its deadline, wherever it is: waiting for its turn or between two steps."""

import threading
import time

import pytest

from toile.core.errors import DeadlineError
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.turns import Urgency


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path())


def within(seconds: float, **fields: object) -> DiffusionRequest:
    urgency = Urgency(deadline=time.monotonic() + seconds)
    return DiffusionRequest("a red dress", [1], urgency=urgency, **fields)


def test_nothing_is_drawn_after_the_deadline(bundle: Bundle) -> None:
    steps: list[int] = []
    with pytest.raises(DeadlineError):
        next(
            diffuse(
                bundle,
                TorchDenoiser(bundle),
                within(-1.0),
                on_step=lambda _image, step, _total: steps.append(step),
            )
        )
    assert steps == []


def test_a_drawing_ends_with_the_step_in_which_its_deadline_comes(bundle: Bundle) -> None:
    denoiser = TorchDenoiser(bundle)
    next(diffuse(bundle, denoiser, DiffusionRequest("a red dress", [1], steps=1)))
    steps: list[int] = []
    request = within(1.0, steps=100_000)

    def on_step(_image: int, step: int, _total: int) -> None:
        assert time.monotonic() < request.urgency.deadline + 10.0
        steps.append(step)

    with pytest.raises(DeadlineError):
        next(diffuse(bundle, denoiser, request, on_step=on_step))
    assert steps[-1] == len(steps) >= 1


def test_a_drawing_does_not_wait_for_its_turn_beyond_its_deadline(bundle: Bundle) -> None:
    denoiser = TorchDenoiser(bundle)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with denoiser.session([]):
            taken.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(60)
    try:
        with pytest.raises(DeadlineError, match="turn"):
            next(diffuse(bundle, denoiser, within(0.5, steps=1)))
    finally:
        done.set()
        holder.join()
