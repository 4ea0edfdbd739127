"""The file that describes a training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, PositiveFloat, field_validator, model_validator

from toile.cli.config_file import Name, Section, Text, read_file
from toile.cli.names import Names
from toile.core.errors import InvalidArgumentError
from toile.core.names import BaseName
from toile.core.settings import Settings
from toile.training.config import ControlNetRecipeConfig, LoraRecipeConfig, RecipeConfig

if TYPE_CHECKING:
    from toile.v1 import train_pb2


def _is_dataset(value: str) -> str:
    try:
        Names(Settings()).dataset_or_version(value)
    except InvalidArgumentError:
        raise ValueError(
            "must be a dataset, such as lace, or a version of one, such as lace/2"
        ) from None
    return value


def _is_base(value: str) -> str:
    if not BaseName.matches(value):
        raise ValueError("must be a base, such as bases/sdxl")
    return value


class TrainingJob(Section):
    """A training."""

    model: Name = Field(description="Name of the model; made if it is not there.")
    dataset: Annotated[Text, AfterValidator(_is_dataset)] = Field(
        description="Dataset to train on, for its newest version, or a version of it."
    )
    base: Annotated[str, AfterValidator(_is_base)] | None = Field(
        None, description="Base model; the platform's own if left out."
    )
    budget: PositiveFloat | None = Field(
        None, description="What it may cost at the platform's prices; without a limit if left out."
    )
    lora: LoraRecipeConfig | None = Field(
        None, description="The recipe for a style; what it leaves out has a default."
    )
    controlnet: ControlNetRecipeConfig | None = Field(
        None, description="The recipe for a ControlNet; what it leaves out has a default."
    )

    @field_validator("lora", "controlnet", mode="before")
    @classmethod
    def _is_a_mapping(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("must be a mapping; {} is one of defaults alone")
        return value

    @model_validator(mode="after")
    def _has_one_recipe(self) -> Self:
        if (self.lora is None) == (self.controlnet is None):
            raise ValueError("needs one recipe: lora or controlnet")
        return self

    def request(self, names: Names) -> "train_pb2.CreateTrainingJobRequest":
        """What to ask the service; only what the file says is said."""
        from toile.v1 import train_pb2

        request = train_pb2.CreateTrainingJobRequest(
            parent=names.project,
            model_id=self.model,
            dataset=names.dataset_or_version(self.dataset),
            base=self.base or "",
            budget=self.budget,
        )
        if self.lora is not None:
            request.lora.CopyFrom(train_pb2.LoraConfig(**_said(self.lora)))
        if self.controlnet is not None:
            request.controlnet.CopyFrom(train_pb2.ControlNetConfig(**_said(self.controlnet)))
        return request


def _said(config: RecipeConfig) -> dict[str, Any]:
    return config.model_dump(exclude_unset=True)


def load_job(path: Path) -> TrainingJob:
    """Read and check a job file.

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: It says something wrong (`BAD_JOB`).
    """
    return read_file(path, TrainingJob, kind="job", reason="BAD_JOB")
