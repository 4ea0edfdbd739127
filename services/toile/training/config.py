"""What a recipe can be told; validated when made, and free of torch, so that services can ask."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from toile.core.adapter_types import AdapterType
from toile.core.errors import InvalidArgumentError

MASKS, MAPS = "masks", "maps"
"""What may be computed once of a dataset's images, beside what all recipes need of them."""
MAX_RANK = 64
MAX_SAMPLE_PROMPTS = 8
MAX_PATTERNS = 64
MAX_CLASS_IMAGES = 10_000
MAX_LEARNING_RATE = 0.1
MAX_PRODIGY_RATE = 10.0
_PRODIGY_RATE = 1.0

Prompt = Annotated[str, Field(min_length=1)]
Pattern = Annotated[str, Field(min_length=1, max_length=255)]
RepeatCount = Annotated[int, Field(ge=1, le=100)]


class RecipeConfig(BaseModel):
    """What all recipes can be told. Field names are those of the messages of `toile.v1`."""

    RECIPE: ClassVar[str]
    """Name of the recipe, and of its field in a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(1e-3, gt=0, le=MAX_PRODIGY_RATE, description="Peak learning rate.")
    steps: int = Field(160, ge=1, le=1_000_000, description="Optimizer steps.")
    batch_size: int = Field(8, ge=1, le=256, description="Images in a step, over all workers.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of everything random in the run.")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of captions replaced by the empty caption."
    )
    min_snr_gamma: float = Field(
        5.0, ge=0, le=100, description="Gamma of min-SNR loss weighting; 0 turns it off."
    )
    checkpoint_interval_steps: int = Field(
        50, ge=1, le=1_000_000, description="Steps between two checkpoints."
    )
    sample_prompts: tuple[Prompt, ...] = Field(
        (), max_length=MAX_SAMPLE_PROMPTS, description="Prompts of the samples."
    )

    learning_rate_schedule: Literal["cosine", "constant", "linear"] = Field(
        "cosine", description="How the rate goes on; cosine and linear fall to a tenth."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps in which the rate rises; a twentieth of them if unset."
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = Field(
        "adamw", description="Optimizer."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean gradient.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of its mean square.")
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="Deviation of noise added to a whole channel; 0 is off."
    )
    huber_c: float = Field(
        0.0, ge=0, le=100, description="Where the pseudo-Huber loss turns linear; 0 is squared."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=256, description="Pieces that a step's images are computed in."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again instead of keeping them."
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Decay of the published moving average; 0 is off."
    )
    validation_share: float = Field(
        0.0, ge=0, le=0.5, description="Share of the images held out to validate on; 0 is off."
    )
    validation_interval_steps: int = Field(
        50, ge=1, le=1_000_000, description="Steps between two validations."
    )
    early_stopping_patience: int = Field(
        0, ge=0, le=1000, description="Validations without a new best that end a run; 0 is off."
    )
    repeats: dict[Pattern, RepeatCount] = Field(
        {},
        max_length=MAX_PATTERNS,
        description="How often an epoch shows images, by patterns of the names they came with.",
    )
    sample_interval_steps: int = Field(
        0, ge=0, le=1_000_000, description="Steps between two sets of samples; 0: the closing ones."
    )
    publish_weights: Literal["best_validation", "best_samples", "last"] = Field(
        "best_validation", description="Which weights are published."
    )
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = Field(
        "auto", description="What networks compute in; bf16 where the hardware does, if auto."
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """A YAML file's bare `no` is false."""
        return "no" if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _prodigy_finds_its_own_rate(cls, values: Any) -> Any:
        """With Prodigy the rate is a factor of the one it finds: 1 unless it is given."""
        if isinstance(values, Mapping) and values.get("optimizer") == "prodigy":
            return {"learning_rate": _PRODIGY_RATE, **values}
        return values

    @model_validator(mode="after")
    def _rate_suits_the_optimizer(self) -> Self:
        if self.optimizer != "prodigy" and self.learning_rate > MAX_LEARNING_RATE:
            # Raised so, for an error of the whole would not name the field.
            detail = InitErrorDetails(
                type="less_than_equal",
                loc=("learning_rate",),
                input=self.learning_rate,
                ctx={"le": MAX_LEARNING_RATE},
            )
            raise ValidationError.from_exception_data(type(self).__name__, [detail])
        return self

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps")
        if warmup is not None and steps is not None and warmup > steps:
            raise ValueError(f"must be at most the {steps} steps of the run")
        return warmup

    @field_validator("gradient_accumulation_steps")
    @classmethod
    def _every_piece_has_an_image(cls, pieces: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size")
        if batch_size is not None and pieces > batch_size:
            raise ValueError(f"must be at most the {batch_size} images of a step")
        return pieces

    @field_validator("early_stopping_patience")
    @classmethod
    def _patience_needs_validations(cls, patience: int, info: ValidationInfo) -> int:
        if patience and info.data.get("validation_share") == 0:
            raise ValueError("needs a validation_share above 0")
        return patience

    @field_validator("publish_weights")
    @classmethod
    def _best_samples_need_samples(cls, weights: str, info: ValidationInfo) -> str:
        if weights == "best_samples" and info.data.get("sample_interval_steps") == 0:
            raise ValueError("best_samples needs a sample_interval_steps above 0")
        return weights

    @field_validator("adam_beta1", "adam_beta2")
    @classmethod
    def _adafactor_has_no_betas(cls, beta: float, info: ValidationInfo) -> float:
        # A configuration read back names every field, so a default says nothing.
        default = cls.model_fields[info.field_name or ""].default
        if info.data.get("optimizer") == "adafactor" and beta != default:
            raise ValueError("is not of the optimizer adafactor")
        return beta

    @property
    def images_per_step(self) -> int:
        """Images that a step computes, over all workers."""
        return self.batch_size

    @property
    def text_rate_share(self) -> float:
        """The text encoders' rate over that of the rest, where they are trained."""
        return 1.0

    @property
    def reads_tokens(self) -> bool:
        """Whether captions are kept as tokens, for text encoders that are trained."""
        return False

    @property
    def cached(self) -> Mapping[str, str]:
        """What is computed once of each image of the dataset, and what of it."""
        return {}

    @property
    def class_images(self) -> tuple[str, int]:
        """The prompt of images that the base draws beside the dataset's, and their number."""
        return "", 0

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from a request's values.

        Raises:
            InvalidArgumentError: A value is wrong; the recipe and the value's path name it.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            path = ".".join([cls.RECIPE, *(str(part) for part in first["loc"])])
            message = first["msg"].removeprefix("Value error, ")
            raise InvalidArgumentError(
                f"{path}: {message[0].lower()}{message[1:]}",
                field=path,
                reason="BAD_CONFIG",
            ) from error


class _UpdateMatrices(BaseModel):
    """LoRA's own; a class to itself, for these are first in what is stored."""

    rank: int = Field(16, ge=1, le=MAX_RANK, description="Rank of the update matrices.")
    alpha: float = Field(
        16.0, gt=0, le=1024, description="The update is multiplied by alpha / rank."
    )


class LoraRecipeConfig(RecipeConfig, _UpdateMatrices):
    """A LoRA on the UNet's transformers. Field names are those of `toile.v1.LoraConfig`.

    The defaults let the tiny base learn 32 photographs in about half a minute on two cores.
    """

    RECIPE: ClassVar[str] = AdapterType.LORA

    masked_loss: bool = Field(
        False, description="Whether the loss counts the garment more than the background."
    )
    background_weight: float = Field(
        0.0, ge=0, le=1, description="What the background counts in a masked loss."
    )
    class_prompt: str = Field(
        "", description="What the class shows that the style belongs to; none if empty."
    )
    class_image_count: int = Field(
        0,
        ge=0,
        le=MAX_CLASS_IMAGES,
        validate_default=True,
        description="Images of the class that the base draws.",
    )
    prior_loss_weight: float = Field(
        1.0, gt=0, le=100, description="What the loss of an image of the class counts."
    )

    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of what each update is given that is zeroed."
    )
    target_modules: Literal["attention", "transformer"] = Field(
        "attention", description="Linears of the UNet's transformers that are changed."
    )

    train_text_encoders: bool = Field(
        False, description="Whether the attention of the text encoders is trained, too."
    )
    text_encoder_learning_rate: float | None = Field(
        None,
        gt=0,
        le=MAX_LEARNING_RATE,
        description="Peak learning rate of the text encoders; the other one if unset.",
    )
    use_dora: bool = Field(
        False, description="Whether magnitudes of the changed weights' rows are trained, too."
    )

    @field_validator("background_weight")
    @classmethod
    def _weight_needs_masks(cls, weight: float, info: ValidationInfo) -> float:
        if weight and info.data.get("masked_loss") is False:
            raise ValueError("needs masked_loss: true")
        return weight

    @field_validator("class_prompt")
    @classmethod
    def _class_prompt_has_words(cls, prompt: str) -> str:
        if prompt and not prompt.strip():
            raise ValueError("is blank")
        return prompt

    @field_validator("class_image_count")
    @classmethod
    def _class_has_a_prompt_and_images(cls, count: int, info: ValidationInfo) -> int:
        prompt = info.data.get("class_prompt")
        if count and prompt == "":
            raise ValueError("needs a class_prompt")
        if prompt and not count:
            raise ValueError("must be above 0, for there is a class_prompt")
        return count

    @field_validator("prior_loss_weight")
    @classmethod
    def _weight_needs_a_class(cls, weight: float, info: ValidationInfo) -> float:
        # A configuration read back names every field, so a default says nothing.
        default = cls.model_fields["prior_loss_weight"].default
        if weight != default and info.data.get("class_prompt") == "":
            raise ValueError("needs a class_prompt")
        return weight

    @field_validator("text_encoder_learning_rate")
    @classmethod
    def _rate_needs_text_encoders(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and info.data.get("train_text_encoders") is False:
            raise ValueError("needs train_text_encoders: true")
        if rate is not None and info.data.get("optimizer") == "prodigy":
            raise ValueError("is not of the optimizer prodigy, which finds one rate for all")
        return rate

    @field_validator("use_dora")
    @classmethod
    def _dora_is_of_the_unet(cls, use_dora: bool, info: ValidationInfo) -> bool:
        if use_dora and info.data.get("train_text_encoders"):
            raise ValueError("needs train_text_encoders: false; DoRAs are of the UNet alone")
        return use_dora

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, values: Any) -> Any:
        """Alpha is the rank unless it is given, so that a changed rank keeps the strength."""
        if isinstance(values, Mapping) and "rank" in values and "alpha" not in values:
            return {**values, "alpha": values["rank"]}
        return values

    @property
    def text_rate_share(self) -> float:
        """The text encoders' rate over that of the UNet."""
        return (self.text_encoder_learning_rate or self.learning_rate) / self.learning_rate

    @property
    def reads_tokens(self) -> bool:
        """Whether the text encoders are trained."""
        return self.train_text_encoders

    @property
    def cached(self) -> Mapping[str, str]:
        """Masks, for a masked loss."""
        return {MASKS: ""} if self.masked_loss else {}

    @property
    def class_images(self) -> tuple[str, int]:
        """Those of the class."""
        return self.class_prompt, self.class_image_count

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / self.rank

    @property
    def images_per_step(self) -> int:
        """Images that a step computes: as many of the class, if there is one, as of the dataset."""
        return self.batch_size * (2 if self.class_prompt else 1)


class ControlNetRecipeConfig(RecipeConfig):
    """A ControlNet beside the UNet. Field names are those of `toile.v1.ControlNetConfig`.

    Half of the captions are dropped, so that it learns to read the map where no prompt helps
    (Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023, 3.3).
    """

    RECIPE: ClassVar[str] = AdapterType.CONTROLNET

    control_kind: Literal["edges", "parts", "edges_parts", "given"] = Field(
        "edges", description="What of a picture it is shown."
    )
    initial_weights: Literal["unet", "base"] = Field(
        "unet",
        description="What it starts as: the UNet's encoder, or the base's own ControlNet.",
    )
    learning_rate: float = Field(5e-4, gt=0, le=MAX_PRODIGY_RATE, description="Peak learning rate.")
    steps: int = Field(2000, ge=1, le=1_000_000, description="Optimizer steps.")
    caption_dropout: float = Field(
        0.5, ge=0, le=1, description="Share of captions replaced by the empty caption."
    )

    @property
    def cached(self) -> Mapping[str, str]:
        """Maps, by what they show."""
        return {MAPS: self.control_kind}

    @property
    def sees_parts(self) -> bool:
        """Whether the maps show parts, which take a segmenter."""
        return "parts" in self.control_kind


RECIPES: Mapping[str, type[LoraRecipeConfig] | type[ControlNetRecipeConfig]] = {
    config.RECIPE: config for config in (LoraRecipeConfig, ControlNetRecipeConfig)
}
"""Configurations by the names of their recipes."""
