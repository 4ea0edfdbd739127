"""What all arms train, and how: the same pictures, batch and adapter."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from toile.diffusion.bundle import Bundle
from toile.training.config import LoraRecipeConfig
from toile.training.data import METADATA_FILE, Example, read_examples


@dataclass(frozen=True)
class Task:
    """A training of some steps.

    Attributes:
        base: Folder of the base.
        folder: Pictures with a `metadata.jsonl`, as both `datasets` and Toile read them.
        steps: Optimizer steps, of which the first `warm_up` are not counted.
        batch_size: Images in a step.
    """

    base: Path
    folder: Path
    steps: int
    warm_up: int
    batch_size: int

    def config(self) -> LoraRecipeConfig:
        """The recipe with what the script does not do turned off."""
        return LoraRecipeConfig(
            rank=16,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=1e-4,
            learning_rate_schedule="constant",
            warmup_steps=0,
            caption_dropout=0,
            min_snr_gamma=0,
            checkpoint_interval_steps=1_000_000,
        )

    def inputs(self) -> tuple[Bundle, list[Example]]:
        """Load the base, and read the pictures' list."""
        return Bundle.load(self.base), read_examples(self.folder)


def prepare(photos: Path, folder: Path, caption: str, side: int | None = None) -> None:
    """Copy photographs, as squares of `side` pixels if it is given, and caption all the same."""
    folder.mkdir(parents=True)
    lines = []
    for photo in sorted(photos.iterdir()):
        if photo.suffix.lower() not in {".jpg", ".jpeg", ".png", ".webp"}:
            continue
        name = photo.name
        if side is None:
            shutil.copy(photo, folder / name)
        else:
            name = f"{photo.stem}.png"
            ImageOps.fit(Image.open(photo).convert("RGB"), (side, side)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / METADATA_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
