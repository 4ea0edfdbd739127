"""The file that describes a loop."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from toile.cli.config_file import Name, Section, Text, read_file
from toile.training.config import LoraRecipeConfig


class DatasetSection(Section):
    """What to learn from."""

    name: Name = Field(description="Dataset; made if it is not there.")
    folder: Path = Field(description="Folder of photographs, relative to the file.")
    trigger: Text = Field(description='Word that calls the style, such as "<lace>".')
    license: str = Field("", description="Licence of the photographs.")
    resolution: PositiveInt | None = Field(None, description="Side of the crops; the base's own.")
    aspect: Literal["square", "keep"] = Field(
        "square", description="Whether images are cropped to squares or keep about their shape."
    )


class TrainSection(LoraRecipeConfig):
    """How to train. What is left out takes the recipe's default."""

    model: Name = Field(description="Name of the model.")


class RefinerSection(Section):
    """The refiner stage."""

    strength: float = Field(0.2, gt=0, le=0.5, description="Share of the schedule it redraws.")


class GenerateSection(Section):
    """What to draw."""

    prompts: tuple[Text, ...] = Field(min_length=1, max_length=50, description="Prompts.")
    count: PositiveInt = Field(8, le=64, description="Images for each prompt.")
    seed: int = Field(1, ge=0, description="Seed of the first image of each prompt.")
    negative_prompt: str = Field("", description="What to avoid.")
    steps: PositiveInt = Field(20, description="Denoising steps.")
    guidance_scale: PositiveFloat | None = Field(None, description="Strength of the prompt.")
    adapter_weight: float = Field(1.0, description="Strength of the trained style.")
    refiner: RefinerSection | None = Field(None, description="Refiner stage; none if left out.")

    @field_validator("refiner")
    @classmethod
    def _refiner_has_steps(
        cls, refiner: RefinerSection | None, info: ValidationInfo
    ) -> RefinerSection | None:
        # Known now, it need not cost the training that comes before.
        steps = info.data.get("steps")
        if refiner is not None and steps and steps * refiner.strength < 1:
            raise ValueError(f"{steps} steps leave none for a strength of {refiner.strength:g}")
        return refiner


class RankSection(Section):
    """How to choose."""

    keep: PositiveInt = Field(4, description="How many of the best to keep.")
    scorers: dict[str, float] = Field(
        default_factory=dict, description="Weights by scorer; the platform's own if empty."
    )


class RefineSection(Section):
    """How to change the best."""

    instruction: Text = Field(description='Such as "make it blue".')
    strength: float | None = Field(None, gt=0, le=1, description="How far the region may move.")
    steps: PositiveInt = Field(20, description="Denoising steps.")
    seed: int = Field(1, ge=0, description="Seed.")


class LoopConfig(Section):
    """A whole loop."""

    title: Text = Field(description="Title of the report.")
    out: Path = Field(description="Folder that the results go to, relative to the file.")
    base: str = Field("", description="Base model; the platform's own if empty.")
    dataset: DatasetSection
    train: TrainSection
    generate: GenerateSection
    rank: RankSection = RankSection()
    refine: RefineSection


def load_config(path: Path) -> LoopConfig:
    """Read and check a loop file; its relative paths become absolute.

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: It says something wrong (`BAD_LOOP`).
    """
    config = read_file(path, LoopConfig, kind="loop", reason="BAD_LOOP")
    home = path.resolve().parent
    dataset = config.dataset.model_copy(update={"folder": home / config.dataset.folder})
    return config.model_copy(update={"out": (home / config.out).resolve(), "dataset": dataset})
