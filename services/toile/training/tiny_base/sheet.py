"""A contact sheet of a bundle, for the model card and for the eye."""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from toile.training.tiny_base.evaluate import generate

SHEET_PROMPTS = (
    "a red dress",
    "a blue dress on white background",
    "a white lace dress on grey background",
    "a green skirt",
    "a blue shirt",
    "a red striped shirt on beige background",
    "a yellow t-shirt",
    "a purple t-shirt on grey background",
    "blue denim pants",
    "brown pants on white background",
    "orange shorts",
    "a black jacket on white background",
    "a brown jacket",
    "a pink hat",
    "white floral lace fabric",
    "black floral lace fabric",
)
_COLUMNS = 8
_SAMPLES = 2
_GAP = 4


def write_sheet(bundle: Path, file: Path, *, seed: int = 40) -> None:
    """Two samples of each prompt, eight columns, as a PNG."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(_SAMPLES)]
        pictures = generate(pipeline, prompts, seed=seed)
    side = pictures[0].shape[0]
    rows = -(-len(pictures) // _COLUMNS)
    step = side + _GAP
    sheet = np.full((rows * step - _GAP, _COLUMNS * step - _GAP, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = (index // _COLUMNS) * step, (index % _COLUMNS) * step
        sheet[top : top + side, left : left + side] = picture
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(file, optimize=True)
