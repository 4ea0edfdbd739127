"""Enlarging tile by tile, by the trained tiny base: no seams, and no more new than asked for."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toile.core.errors import CancelledError, InvalidArgumentError
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.request import UpscaleTiles
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.turns import Urgency
from toile.diffusion.upscale import tile_corners, tile_size
from toile.imaging.colours import rgb_to_lab
from toile.imaging.seams import Repeat, seam_score

NATIVE = 128
SIDE = 192
OVERLAP = 32


@pytest.fixture(scope="module")
def trained() -> tuple[Bundle, TorchDenoiser]:
    path = shipped_bundle_path()
    if path is None:
        pytest.skip("this installation has no tiny base")
    bundle = Bundle.load(path)
    return bundle, TorchDenoiser(bundle)


def request(**fields: Any) -> DiffusionRequest:
    return DiffusionRequest(
        **{
            "prompt": "a red floral cotton fabric",
            "seeds": [1],
            "steps": 8,
            "guidance_scale": 3.0,
            **fields,
        }
    )


def enlarge(trained: tuple[Bundle, TorchDenoiser], start: Image.Image, **fields: Any) -> Any:
    tiles = UpscaleTiles(fields.pop("overlap", OVERLAP))
    size = {"width": SIDE, "height": SIDE}
    asked = request(init_image=start, upscale=tiles, **{**size, **fields})
    return next(diffuse(*trained, asked))


@pytest.fixture(scope="module")
def start(trained: tuple[Bundle, TorchDenoiser]) -> Image.Image:
    return next(diffuse(*trained, request(repeat=Repeat.HALF_DROP)))


def steps_at_edges(image: Image.Image, overlap: int) -> float:
    """The mean step across tiles' edges, as a multiple of that between other latents.

    The VAE leaves a faint grid between latents, everywhere, so that is what edges compare with.
    """
    lefts = {left for _, left in tile_corners(image.size, NATIVE, overlap, None)}
    edges = (lefts | {left + NATIVE for left in lefts}) - {0, image.width}
    lab = rgb_to_lab(np.asarray(image))
    across = np.linalg.norm(np.diff(lab, axis=1), axis=-1).mean(axis=0)
    down = np.linalg.norm(np.diff(lab, axis=0), axis=-1).mean(axis=1)
    steps = across + down
    others = set(range(8, image.width, 8)) - edges
    return float(
        steps[[edge - 1 for edge in edges]].mean() / steps[[edge - 1 for edge in others]].mean()
    )


def test_tiles_do_not_show(trained: tuple[Bundle, TorchDenoiser], start: Image.Image) -> None:
    """Measured: 1.0 to 1.3 with an overlap, 4.5 to 5.2 without."""
    large = {"strength": 0.6, "width": 256, "height": 256}
    assert steps_at_edges(enlarge(trained, start, **large), OVERLAP) < 1.7
    assert steps_at_edges(enlarge(trained, start, overlap=0, **large), 0) > 2.5


def test_little_strength_changes_little(
    trained: tuple[Bundle, TorchDenoiser], start: Image.Image
) -> None:
    plain = np.asarray(start.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=float)
    weak, strong = (
        np.abs(np.asarray(enlarge(trained, start, strength=strength)) - plain).mean()
        for strength in (0.13, 0.8)
    )
    assert weak < 16
    assert strong > 1.5 * weak


def test_a_tile_that_repeats_is_enlarged_with_its_neighbours(
    trained: tuple[Bundle, TorchDenoiser], start: Image.Image
) -> None:
    kept = enlarge(trained, start, strength=0.4, repeat=Repeat.HALF_DROP)
    lost = enlarge(trained, start, strength=0.4)
    assert seam_score(kept, Repeat.HALF_DROP) < 2.2
    assert seam_score(lost, Repeat.HALF_DROP) > 3


def test_steps_of_all_tiles_are_counted_and_previews_show_the_whole(
    trained: tuple[Bundle, TorchDenoiser], start: Image.Image
) -> None:
    asked = request(
        init_image=start,
        width=SIDE,
        height=SIDE,
        strength=0.25,
        upscale=UpscaleTiles(OVERLAP),
        preview_interval=4,
    )
    seen: list[tuple[int, int, int]] = []
    previews: list[Image.Image] = []
    next(
        diffuse(
            *trained,
            asked,
            on_step=lambda *step: seen.append(step),
            on_preview=lambda index, step, preview: previews.append(preview),
        )
    )
    assert seen == [(0, step, 8) for step in range(1, 9)]  # two of each of four tiles
    assert [preview.size for preview in previews] == [(SIDE, SIDE)] * 2

    seen.clear()
    images = diffuse(
        *trained,
        replace(asked, urgency=Urgency(cancelled=lambda: len(seen) == 3)),
        on_step=lambda *step: seen.append(step),
    )
    with pytest.raises(CancelledError):
        next(images)
    assert len(seen) == 3


@pytest.mark.parametrize("repeat", [None, *Repeat])
@pytest.mark.parametrize("size", [(128, 128), (192, 256), (64, 512), (136, 320)])
@pytest.mark.parametrize("overlap", [0, 20, 64])
def test_tiles_cover_the_image(size: tuple[int, int], overlap: int, repeat: Repeat | None) -> None:
    covered = np.zeros(size, dtype=int)
    height, width = tile_size(size, NATIVE, repeat)
    for top, left in tile_corners(size, NATIVE, overlap, repeat):
        assert top % 8 == 0
        assert left % 8 == 0
        assert repeat or (top + height <= size[0] and left + width <= size[1])
        covered[top : top + height, left : left + width] += 1
    assert covered.min() >= 1


def test_tiles_share_at_most_half_of_each_other(bundle: Bundle) -> None:
    asked = request(
        init_image=Image.new("RGB", (64, 64)), width=256, height=256, upscale=UpscaleTiles(65)
    )
    with pytest.raises(InvalidArgumentError) as caught:
        next(diffuse(bundle, TorchDenoiser(bundle), asked))
    assert caught.value.metadata["field"] == "upscale.overlap"
