"""Prompts that a training draws: checked, and chosen where none are given, before it is queued."""

from collections.abc import Callable, Sequence

from toile.core.content import restricted_term
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.prompts import CHUNK_TOKENS, MAX_CHUNKS, check_prompt, count_chunks, escape
from toile.core.settings import Settings
from toile.training.config import ControlNetRecipeConfig, LoraRecipeConfig, RecipeConfig

_DEFAULT_SAMPLES = 2


class PromptRules:
    """What the prompts of trainings on one base may say."""

    def __init__(self, settings: Settings, count_tokens: Callable[[str], int]) -> None:
        """Take the settings, and what counts a text's tokens as the base's tokenizer does."""
        self._longest = settings.limits.prompt_characters
        self._refuses = settings.restricted_content == "refuse"
        self._count_tokens = count_tokens

    def check(self, config: RecipeConfig) -> None:
        """Refuse prompts that the base would not read to their end, or nobody may ask for.

        Raises:
            InvalidArgumentError: One is too long (`BAD_CONFIG`, `PROMPT_TOO_LONG`) or not well
                formed (`BAD_EMPHASIS`).
            FailedPreconditionError: One asks for what is for adults, and that is refused here
                (`RESTRICTED_CONTENT`).
        """
        for index, prompt in enumerate(config.sample_prompts):
            field = f"{config.RECIPE}.sample_prompts.{index}"
            self._check_length(prompt, field)
            check_prompt(prompt, self._count_tokens, field)
            self._check_allowed(prompt, field)
        if isinstance(config, LoraRecipeConfig):
            self._check_class(config.class_prompt, "lora.class_prompt")

    def defaults(
        self, captions: Sequence[str], trigger_word: str, config: RecipeConfig
    ) -> tuple[str, ...]:
        """Captions to draw samples of when a request names no prompts.

        Each sample of a ControlNet is drawn under the map of an image, so theirs are the first
        captions; other samples are better when they differ. A caption that may not be drawn, or
        would not be read to its end, is passed over.

        Args:
            captions: Of the dataset version's images, in the order that samples are drawn of them.
            trigger_word: Of the dataset; drawn where there is no such caption.
            config: Of the training.
        """
        if isinstance(config, ControlNetRecipeConfig):
            first = captions[:_DEFAULT_SAMPLES]
            texts = [text if self._can_be_drawn(text) else trigger_word for text in first]
        else:
            texts = list(dict.fromkeys(filter(self._can_be_drawn, captions)))[:_DEFAULT_SAMPLES]
        # Trained on as they stand, so that brackets in them are no emphasis.
        return tuple(escape(text) for text in texts or [trigger_word])

    def _can_be_drawn(self, caption: str) -> bool:
        if not caption or (self._refuses and restricted_term(caption)):
            return False
        prompt = escape(caption)
        if len(prompt) > self._longest:
            return False
        return count_chunks(prompt, self._count_tokens) <= MAX_CHUNKS

    def _check_class(self, prompt: str, field: str) -> None:
        """A class prompt is read literally, and in one chunk as captions are."""
        self._check_length(prompt, field)
        self._check_allowed(prompt, field)
        tokens = self._count_tokens(" ".join(prompt.split()))
        if tokens > CHUNK_TOKENS:
            raise InvalidArgumentError(
                f"{field} has {tokens} tokens; {CHUNK_TOKENS} are the most",
                field=field,
                reason="PROMPT_TOO_LONG",
                metadata={"tokens": str(tokens), "limit": str(CHUNK_TOKENS)},
            )

    def _check_length(self, prompt: str, field: str) -> None:
        if len(prompt) > self._longest:
            raise InvalidArgumentError(
                f"{field} has {len(prompt)} characters; {self._longest} are the most",
                field=field,
                reason="BAD_CONFIG",
            )

    def _check_allowed(self, prompt: str, field: str) -> None:
        """Refuse a prompt that nobody could ask a drawing of."""
        if self._refuses and (term := restricted_term(prompt)):
            raise FailedPreconditionError(
                f"{field} asks for what is for adults ({term[:40]}), which this platform does "
                "not draw",
                reason="RESTRICTED_CONTENT",
                metadata={"field": field},
            )
