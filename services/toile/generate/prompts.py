"""The seeds and prompts of a generation's images, and what a prompt may say."""

from collections.abc import Sequence

from toile.core.content import restricted_term
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.settings import Settings
from toile.generate.facts import BaseFacts
from toile.generate.wildcards import check_template, check_wildcards, expand
from toile.v1 import generate_pb2


def seeds_of(request: generate_pb2.GenerateRequest) -> Sequence[int]:
    """Return the seed of each image of a resolved request."""
    if request.seeds:
        return list(request.seeds)
    return [request.seed + index for index in range(request.count)]


def prompts_of(request: generate_pb2.GenerateRequest, most_characters: int) -> Sequence[str]:
    """Return the prompt of each image of a resolved request, wildcards and variants chosen.

    Raises:
        InvalidArgumentError: One is too long, or names a list that is not there.
    """
    lists = _lists(request)
    return [
        expand(request.prompt, lists, seed, most_characters=most_characters)
        for seed in seeds_of(request)
    ]


def check_prompts(
    request: generate_pb2.GenerateRequest,
    settings: Settings,
    facts: BaseFacts,
    *,
    restricted_field: str,
) -> None:
    """Refuse what cannot be read or may not be drawn. The request is resolved, its prompt known.

    `restricted_field` names an image that is for adults; it is empty when there is none.

    Raises:
        InvalidArgumentError: A prompt is empty, too long or not well formed.
        FailedPreconditionError: It asks for what is for adults, and that is refused here
            (`RESTRICTED_CONTENT`).
    """
    limit = settings.limits.prompt_characters
    if not request.prompt.strip():
        raise InvalidArgumentError("prompt is empty", field="prompt", reason="EMPTY_PROMPT")
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field))
        if length > limit:
            raise InvalidArgumentError(
                f"{field} has {length} characters; {limit} are the most",
                field=field,
                reason="PROMPT_TOO_LONG",
                metadata={"characters": str(length), "limit": str(limit)},
            )
    lists = _lists(request)
    check_wildcards(lists)
    check_template(request.prompt, lists)
    prompts = sorted(set(prompts_of(request, limit)))
    for prompt in prompts:
        if not prompt.strip():
            raise InvalidArgumentError(
                "prompt is empty for some of its variants", field="prompt", reason="EMPTY_PROMPT"
            )
        facts.check_prompt(prompt, "prompt")
    facts.check_prompt(request.negative_prompt, "negative_prompt")
    if settings.restricted_content == "refuse":
        if restricted_field:
            raise FailedPreconditionError(
                "the image to draw from is for adults, which this platform does not draw",
                reason="RESTRICTED_CONTENT",
                metadata={"field": restricted_field},
            )
        _refuse_restricted(prompts)


def _refuse_restricted(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if term := restricted_term(prompt):
            raise FailedPreconditionError(
                f"the prompt asks for what is for adults ({term[:40]}), which this platform does "
                "not draw",
                reason="RESTRICTED_CONTENT",
                metadata={"field": "prompt"},
            )


def _lists(request: generate_pb2.GenerateRequest) -> dict[str, Sequence[str]]:
    return {name: list(wildcard.values) for name, wildcard in request.wildcards.items()}
