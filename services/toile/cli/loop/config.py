"""The file that describes a loop."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from toile.core.errors import InvalidArgumentError, NotFoundError
from toile.core.names import ID


def _is_id(value: str) -> str:
    if not ID.fullmatch(value):
        raise ValueError("must be 1 to 63 lower-case letters, digits and inner dashes")
    return value


Name = Annotated[str, AfterValidator(_is_id)]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetSection(_Section):
    """What to learn from."""

    name: Name = Field(description="Dataset; made if it is not there.")
    folder: Path = Field(description="Folder of photographs, relative to the file.")
    trigger: Text = Field(description='Word that calls the style, such as "<lace>".')
    license: str = Field("", description="Licence of the photographs.")
    resolution: PositiveInt | None = Field(None, description="Side of the crops; the base's own.")


class TrainSection(_Section):
    """How to train. What is left out takes the recipe's default."""

    model: Name = Field(description="Name of the model.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps.")
    rank: PositiveInt | None = Field(None, description="Rank of the LoRA.")
    alpha: PositiveFloat | None = Field(None, description="Scale: alpha / rank.")
    learning_rate: PositiveFloat | None = Field(None, description="Peak learning rate.")
    batch_size: PositiveInt | None = Field(None, description="Images in a step.")
    caption_dropout: float | None = Field(None, ge=0, le=1, description="Captions left empty.")
    min_snr_gamma: float | None = Field(None, ge=0, description="0 turns it off.")
    checkpoint_interval_steps: PositiveInt | None = Field(None, description="Steps between two.")
    seed: int | None = Field(None, description="Seed of everything random.")


class RefinerSection(_Section):
    """The refiner stage."""

    strength: float = Field(0.2, gt=0, le=0.5, description="Share of the schedule it redraws.")


class GenerateSection(_Section):
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


class RankSection(_Section):
    """How to choose."""

    keep: PositiveInt = Field(4, description="How many of the best to keep.")
    scorers: dict[str, float] = Field(
        default_factory=dict, description="Weights by scorer; the platform's own if empty."
    )


class RefineSection(_Section):
    """How to change the best."""

    instruction: Text = Field(description='Such as "make it blue".')
    strength: float | None = Field(None, gt=0, le=1, description="How far the region may move.")
    steps: PositiveInt = Field(20, description="Denoising steps.")
    seed: int = Field(1, ge=0, description="Seed.")


class LoopConfig(_Section):
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
        InvalidArgumentError: It is no YAML, or says something wrong; file, line and field are
            named (`BAD_LOOP`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no loop file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"{path} cannot be read: {error}") from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _bad(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        config = LoopConfig.model_validate(content)
    except ValidationError as error:
        lines = [_describe(path, tree, detail) for detail in error.errors()]
        raise _bad("; ".join(lines)) from error
    home = path.resolve().parent
    dataset = config.dataset.model_copy(update={"folder": home / config.dataset.folder})
    return config.model_copy(update={"out": (home / config.out).resolve(), "dataset": dataset})


def _describe(path: Path, tree: yaml.Node | None, detail: Any) -> str:
    location = tuple(detail["loc"])
    field = ".".join(str(part) for part in location) or "the whole file"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "there is no such field"
    elif detail["type"] == "missing":
        message = "is missing"
    return f"{path}:{_line(tree, location)}: {field}: {message}"


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """Return the line of a field, or of the nearest thing around it that is in the file."""
    if node is None:
        return 1
    line: int = node.start_mark.line + 1
    for part in location:
        child: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            child = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            child = (node.value[part], node.value[part]) if part < len(node.value) else None
        if child is None:
            break
        line, node = child[0].start_mark.line + 1, child[1]
    return line


def _bad(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="loop", reason="BAD_LOOP")
