"""The sample photographs: one designer's folder of rose lace, in a style the base never saw.

`python -m toile.imaging.renderer.lace_samples FOLDER` writes them. Motif (`rosette`), colourway
(ivory over burgundy) and backdrop (lilac) are all kept out of the base's training data, so that a
LoRA trained on the folder has something visible to learn.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from toile.imaging.colours import RGB
from toile.imaging.renderer.draw import render
from toile.imaging.renderer.spec import HELD_OUT_MOTIF, Background, GarmentSpec, sample_spec

SAMPLE_SIZE = 512
JPEG_QUALITY = 88

_IVORY: RGB = (240, 230, 206)
_BURGUNDY: RGB = (116, 26, 52)
_LILAC: RGB = (200, 188, 214)
_GARMENTS = (
    *("fabric",) * 6,
    *("dress",) * 9,
    *("skirt",) * 6,
    *("shirt",) * 3,
    *("t-shirt",) * 3,
    *("shorts",) * 2,
    "jacket",
    "pants",
    "hat",
)
_CAPTIONED_EVERY = 4
_SUBJECTS = {"fabric": "a length of {lace}", "pants": "{lace} pants", "shorts": "{lace} shorts"}


def sample_specs(seed: int = 20) -> list[GarmentSpec]:
    """The specifications of all sample photographs, in order."""
    return [_style(category, seed, index) for index, category in enumerate(_GARMENTS)]


def _style(category: str, seed: int, index: int) -> GarmentSpec:
    rng = np.random.default_rng([seed, index])
    spec = sample_spec(rng, category=category, colour="beige", material="lace")
    cloth = replace(
        spec.cloth,
        colour=_shade(rng, _IVORY, 4),
        accent=_BURGUNDY,
        motif=HELD_OUT_MOTIF,
        scale=float(rng.uniform(0.85, 1.1)),
        lining=_shade(rng, _BURGUNDY, 6),
        angle_degrees=float(rng.choice([0.0, 0.0, 0.0, 20.0, -15.0]) + rng.normal(0, 2)),
    )
    pose = replace(spec.pose, scale=float(rng.uniform(0.94, 1.04)))
    kinds = ("plain", "gradient", "spot", "floor")
    backdrop = Background(_shade(rng, _LILAC, 5), kinds[index % len(kinds)], index)
    return replace(spec, cloth=cloth, pose=pose, background=backdrop)


def _shade(rng: np.random.Generator, colour: RGB, spread: float) -> RGB:
    red, green, blue = (int(np.clip(c + rng.normal(0, spread), 0, 255)) for c in colour)
    return red, green, blue


def write_lace_samples(folder: Path) -> list[Path]:
    """Write the JPEGs, and captions beside every fourth; gives back the JPEGs' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, spec in enumerate(sample_specs()):
        path = folder / f"{index + 1:02d}-{spec.category}.jpg"
        image = render(spec, SAMPLE_SIZE).image
        _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        path.write_bytes(data.tobytes())
        if index % _CAPTIONED_EVERY == 0:
            subject = _SUBJECTS.get(spec.category, "an {lace} " + spec.category)
            caption = subject.format(lace="ivory rose lace")
            path.with_suffix(".txt").write_text(f"{caption} over burgundy\n", encoding="utf-8")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample photographs into a folder."""
    parser = argparse.ArgumentParser(description="Draw the lace sample photographs.")
    parser.add_argument("folder", type=Path)
    write_lace_samples(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
