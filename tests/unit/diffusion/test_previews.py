"""Previews of the trained tiny base look like what comes of them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.previews import MAX_PREVIEW_SIDE, Previewer, enlarge
from toile.diffusion.shipped import shipped_bundle_path
from toile.imaging.seams import Repeat

STEPS = 6


@pytest.fixture(scope="module")
def trained() -> tuple[Bundle, TorchDenoiser]:
    path = shipped_bundle_path()
    if path is None:
        pytest.skip("this installation has no tiny base")
    bundle = Bundle.load(path)
    return bundle, TorchDenoiser(bundle)


def draw(
    trained: tuple[Bundle, TorchDenoiser], **fields: Any
) -> tuple[Image.Image, list[tuple[int, int, Image.Image]]]:
    request = DiffusionRequest(
        **{
            "prompt": "a blue dress on white background",
            "seeds": [3],
            "steps": STEPS,
            "guidance_scale": 3.0,
            **fields,
        }
    )
    previews: list[tuple[int, int, Image.Image]] = []
    images = diffuse(*trained, request, on_preview=lambda *preview: previews.append(preview))
    return next(images), previews


def distance(one: Image.Image, other: Image.Image) -> float:
    """Mean difference, out of 255, of two images seen from afar."""
    small = [
        np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=float)
        for image in (one, other)
    ]
    return float(np.abs(small[0] - small[1]).mean())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scheduler": "DPMSolverMultistepScheduler"},
        {"guidance_scale": 1.0},
        {"repeat": Repeat.STRAIGHT},
    ],
    ids=["euler", "multistep", "unguided", "repeat"],
)
def test_previews_come_near_the_image(
    trained: tuple[Bundle, TorchDenoiser], fields: dict[str, Any]
) -> None:
    image, previews = draw(trained, preview_interval=2, **fields)
    assert [(index, step) for index, step, _ in previews] == [(0, 2), (0, 4), (0, 6)]
    assert all(preview.size == image.size for _, _, preview in previews)
    first, *_, last = (distance(preview, image) for _, _, preview in previews)
    assert last < 14
    assert last <= first


def test_previews_change_nothing_and_are_off_by_default(
    trained: tuple[Bundle, TorchDenoiser],
) -> None:
    image, previews = draw(trained, steps=2)
    again, _ = draw(trained, steps=2, preview_interval=1)
    assert not previews
    assert np.array_equal(np.asarray(image), np.asarray(again))


@torch.inference_mode()
def test_a_fitted_map_knows_colours(trained: tuple[Bundle, TorchDenoiser]) -> None:
    vae = trained[0].vae
    previewer = Previewer.fit(vae)
    for colour in ((200, 30, 40), (40, 60, 200), (230, 230, 220)):
        pixels = torch.tensor(colour).view(1, 3, 1, 1).expand(-1, -1, 64, 64) / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        shown = np.asarray(previewer(latents)).reshape(-1, 3).mean(axis=0)
        assert np.abs(shown - colour).max() < 40


def test_previews_are_at_most_512_pixels() -> None:
    assert enlarge(Image.new("RGB", (16, 12)), 8).size == (128, 96)
    wide = enlarge(Image.new("RGB", (256, 100)), 8)
    assert max(wide.size) == MAX_PREVIEW_SIDE
    assert enlarge(Image.new("RGB", (1024, 8)), 8).size == (512, 4)
