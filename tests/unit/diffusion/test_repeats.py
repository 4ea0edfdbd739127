"""Tiles drawn by the trained tiny base: their copies meet without a seam."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from toile.core.errors import InvalidArgumentError
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.repeats import RollingUNet
from toile.diffusion.shipped import shipped_bundle_path
from toile.imaging.seams import Repeat, seam_score

PROMPT = "a red floral cotton fabric"
LIMIT = 2.0
"""Drawn with 8 steps, four prompts score 0.7 to 1.6; without a repeat 2.6 to 7.7."""


@pytest.fixture(scope="module")
def trained() -> tuple[Bundle, TorchDenoiser]:
    path = shipped_bundle_path()
    if path is None:
        pytest.skip("this installation has no tiny base")
    bundle = Bundle.load(path)
    return bundle, TorchDenoiser(bundle)


def draw(trained: tuple[Bundle, TorchDenoiser], **fields: Any) -> Image.Image:
    request = DiffusionRequest(
        **{"prompt": PROMPT, "seeds": [1], "steps": 8, "guidance_scale": 3.0, **fields}
    )
    return next(diffuse(*trained, request))


@pytest.fixture(scope="module")
def alone(trained: tuple[Bundle, TorchDenoiser]) -> Image.Image:
    return draw(trained)


@pytest.mark.parametrize("repeat", list(Repeat))
def test_copies_of_a_tile_meet_without_a_seam(
    trained: tuple[Bundle, TorchDenoiser], alone: Image.Image, repeat: Repeat
) -> None:
    assert seam_score(alone, repeat) > 1.5 * LIMIT
    assert seam_score(draw(trained, repeat=repeat), repeat) < LIMIT


@pytest.mark.parametrize(
    "fields",
    [
        {"scheduler": "DPMSolverMultistepScheduler"},
        {"scheduler": "HeunDiscreteScheduler", "steps": 5},
        {"refiner_strength": 0.3},
    ],
    ids=["multistep", "two calls a step", "refiner"],
)
def test_samplers_and_the_refiner_keep_to_the_lattice(
    trained: tuple[Bundle, TorchDenoiser], fields: dict[str, Any]
) -> None:
    drawn = draw(trained, repeat=Repeat.HALF_DROP, **fields)
    assert seam_score(drawn, Repeat.HALF_DROP) < LIMIT


def test_a_tile_to_start_from_stays_seamless(trained: tuple[Bundle, TorchDenoiser]) -> None:
    start = draw(trained, repeat=Repeat.BRICK)
    drawn = draw(trained, repeat=Repeat.BRICK, init_image=start, strength=0.5)
    assert seam_score(drawn, Repeat.BRICK) < LIMIT
    assert np.asarray(drawn).tolist() != np.asarray(start).tolist()


def test_a_tile_depends_on_its_seed_alone(trained: tuple[Bundle, TorchDenoiser]) -> None:
    request = DiffusionRequest(PROMPT, [1, 2], steps=2, guidance_scale=3.0, repeat=Repeat.STRAIGHT)
    _, second = diffuse(*trained, request)
    again = draw(trained, steps=2, seeds=[2], repeat=Repeat.STRAIGHT)
    assert np.asarray(second).tolist() == np.asarray(again).tolist()


@pytest.mark.parametrize("repeat", list(Repeat))
def test_a_prediction_comes_back_in_the_samplers_frame(repeat: Repeat) -> None:
    """A network that looks at single pixels does not notice the frame; it sees other ones."""
    seen: list[torch.Tensor] = []

    def unet(sample: torch.Tensor, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
        seen.append(sample)
        return (3 * sample,)

    rolling = RollingUNet(unet, repeat, torch.Generator().manual_seed(0))
    sample = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        assert torch.equal(rolling(sample, 0)[0], 3 * sample)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("repeat", "field"), [(Repeat.HALF_DROP, "height"), (Repeat.BRICK, "width")]
)
def test_half_a_tile_is_a_whole_number_of_latents(
    bundle: Bundle, repeat: Repeat, field: str
) -> None:
    request = DiffusionRequest("", [1], repeat=repeat, **{"width": 64, "height": 64, field: 72})
    with pytest.raises(InvalidArgumentError, match=f"{field} must be") as caught:
        next(diffuse(bundle, Untouched(), request))
    assert caught.value.reason == "BAD_SIZE"
    assert caught.value.metadata["field"] == field


class Untouched:
    """A denoiser of which nothing may be asked."""

    @contextmanager
    def session(self, *_: Any) -> Iterator[Any]:
        raise AssertionError("nothing may be drawn")
        yield

    refiner_session = session
