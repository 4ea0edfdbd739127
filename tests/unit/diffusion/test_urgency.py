"""A drawing ends at its deadline, wherever it is: waiting for its turn or between two steps."""

import socket
import time
from collections.abc import Iterator

import pytest

from toile.core.errors import (
    CancelledError,
    ComputeUnavailableError,
    DeadlineError,
    ToileError,
)
from toile.diffusion.banked_unet import bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.triton.denoiser import TritonDenoiser
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


@pytest.fixture
def taken(bundle: Bundle) -> Iterator[TorchDenoiser]:
    """A denoiser whose turn somebody has and keeps."""
    denoiser = TorchDenoiser(bundle)
    with denoiser.session([]):
        yield denoiser


def test_a_drawing_does_not_wait_for_its_turn_beyond_its_deadline(
    bundle: Bundle, taken: TorchDenoiser
) -> None:
    with pytest.raises(DeadlineError):
        next(diffuse(bundle, taken, within(0.5, steps=1)))


def test_a_drawing_that_is_cancelled_does_not_wait_for_its_turn(
    bundle: Bundle, taken: TorchDenoiser
) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    request = DiffusionRequest("a red dress", [1], urgency=Urgency(cancelled=cancelled))
    with pytest.raises(CancelledError):
        next(diffuse(bundle, taken, request))


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("step_seconds", "deadline_seconds", "kind"),
    [(0.3, 60.0, ComputeUnavailableError), (60.0, 0.3, DeadlineError)],
)
def test_a_server_that_hangs_is_no_deadline_of_the_caller(
    bundle: Bundle,
    silent: str,
    step_seconds: float,
    deadline_seconds: float,
    kind: type[ToileError],
) -> None:
    denoiser = TritonDenoiser(
        silent,
        unet_config=dict(bundle.unet.config),
        layout=bank_layout(bundle.unet),
        link=lambda _: "",
        step_seconds=step_seconds,
    )
    with pytest.raises(kind):
        next(diffuse(bundle, denoiser, within(deadline_seconds, steps=1)))
