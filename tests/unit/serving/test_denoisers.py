"""Where a drawing is denoised: in Triton when it has what the drawing needs, else here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest

from toile.diffusion.controls import LoadedControl
from toile.serving import denoisers
from toile.serving.denoisers import EngineDenoiser
from toile.serving.engines import control_part, model_name, parts_of

EDGES = cast("LoadedControl", "edges")
FOLDS = cast("LoadedControl", "folds")


class Place:
    """A denoiser that says who it is."""

    def __init__(self, name: str, *, ready: bool = True) -> None:
        self.name, self.ready, self.asked = name, ready, 0

    def is_ready(self) -> bool:
        self.asked += 1
        return self.ready

    def has_controls(self, controls: Sequence[Any]) -> bool:
        return list(controls) == [EDGES]

    @contextmanager
    def session(self, *_: Any) -> Iterator[str]:
        yield self.name

    refiner_session = session


def place(denoiser: EngineDenoiser, *controls: LoadedControl) -> object:
    with denoiser.session([], controls=controls) as name:
        return name


@pytest.fixture
def there() -> Place:
    return Place("there", ready=False)


@pytest.fixture
def denoiser(there: Place, monkeypatch: pytest.MonkeyPatch) -> EngineDenoiser:
    monkeypatch.setattr(denoisers, "ASK_AGAIN_SECONDS", 0.0)
    return EngineDenoiser(cast("Any", Place("here")), cast("Any", there))


def test_it_is_here_until_the_server_is_ready_and_then_there(
    denoiser: EngineDenoiser, there: Place
) -> None:
    assert place(denoiser) == place(denoiser, EDGES) == "here"
    there.ready = True
    assert place(denoiser) == "there"
    with denoiser.refiner_session() as name:
        assert name == "there"
    there.ready = False  # a server that goes away is waited for
    asked = there.asked
    assert place(denoiser) == "there"
    assert there.asked == asked


def test_controls_that_no_engine_has_are_here(denoiser: EngineDenoiser, there: Place) -> None:
    there.ready = True
    assert place(denoiser, EDGES) == "there"
    assert place(denoiser, FOLDS) == place(denoiser, EDGES, FOLDS) == "here"


def test_engines_are_of_what_a_base_has() -> None:
    plain = ["model_index.json", "unet/config.json", "vae/config.json"]
    assert parts_of(plain) == ["unet"]
    more = ["controlnet/parts/config.json", "controlnet/edges/config.json"]
    more += ["controlnet/edges/diffusion_pytorch_model.safetensors", "refiner/unet/config.json"]
    assert parts_of([*more, *plain]) == ["unet", "refiner", "unet-edges", "unet-parts"]
    assert model_name("0123456789abcdef", control_part("edges")) == "unet-edges-0123456789ab"
