"""The file that describes a training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from toile.cli.config_file import Name, Section, Text, read_file
from toile.cli.names import Names
from toile.core.errors import InvalidArgumentError
from toile.core.names import BaseName
from toile.core.settings import Settings
from toile.training.config import LoraRecipeConfig

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
    lora: LoraRecipeConfig = Field(description="The recipe; what it leaves out has a default.")

    def request(self, names: Names) -> "train_pb2.CreateTrainingJobRequest":
        """What to ask the service; only what the file says is said."""
        from toile.v1 import train_pb2

        return train_pb2.CreateTrainingJobRequest(
            parent=names.project,
            model_id=self.model,
            dataset=names.dataset_or_version(self.dataset),
            base=self.base or "",
            lora=train_pb2.LoraConfig(**self.lora.model_dump(exclude_unset=True)),
        )


def load_job(path: Path) -> TrainingJob:
    """Read and check a job file.

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: It says something wrong (`BAD_JOB`).
    """
    return read_file(path, TrainingJob, kind="job", reason="BAD_JOB")
