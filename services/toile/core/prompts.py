r"""How a prompt is written: emphasis, breaks and chunks, as in AUTOMATIC1111's web UI.

`(words)` weighs them by 1.1, `[words]` by 1/1.1, `(words:1.3)` by 1.3; brackets nest and their
weights multiply. `\(`, `\)`, `\[`, `\]` and `\\` stand for the characters themselves. `BREAK`
begins a new chunk of what the text encoders read at once. What that UI takes literally is taken
literally here: a closing bracket without an opening one, and a colon without a number behind it;
an opening bracket that is never closed weighs all that follows.

Source: `parse_prompt_attention` in `modules/prompt_parser.py` of
https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from toile.core.errors import InvalidArgumentError

CHUNK_TOKENS = 75
"""Tokens that CLIP's text encoders read at once, without the two that frame them."""
MAX_CHUNKS = 8
"""Each is 77 more tokens for the UNet to attend to, at every step."""
MAX_WEIGHT = 10.0

_STEP = 1.1
_PIECE = re.compile(
    r"""
    \\[()\[\]\\]                    # a character that means itself
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | [()\[\]:\\]
    | [^()\[\]:\\]+
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Span:
    """Some words and how much they weigh."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str, field: str = "prompt") -> list[list[Span]]:
    """Return the prompt's sections, which `BREAK` divides; at least one, empty ones left out.

    Raises:
        InvalidArgumentError: A weight is no number, or a span's weights multiply to less than 0
            or more than `MAX_WEIGHT` (`BAD_EMPHASIS`).
    """
    sections: list[list[Span]] = [[]]
    for span in _weigh(prompt, field):
        first, *others = _BREAK.split(span.text)
        sections[-1].append(Span(first, span.weight))
        sections.extend([Span(text, span.weight)] for text in others)
    kept = [merged for section in sections if (merged := _merge(section))]
    return kept or [[]]


def count_chunks(prompt: str, count_tokens: Callable[[str], int], field: str = "prompt") -> int:
    """Return how many chunks a prompt takes.

    Args:
        prompt: In this syntax.
        count_tokens: Counts a text's tokens, without the two that frame a chunk.
        field: Named in errors.

    Raises:
        InvalidArgumentError: As for `parse_prompt`.
    """
    tokens = [sum(count_tokens(s.text) for s in spans) for spans in parse_prompt(prompt, field)]
    return sum(max(1, -(-count // CHUNK_TOKENS)) for count in tokens)


def check_prompt(prompt: str, count_tokens: Callable[[str], int], field: str = "prompt") -> int:
    """Return how many chunks a prompt takes, if that can be drawn; arguments as `count_chunks`.

    Raises:
        InvalidArgumentError: It has too many chunks (`PROMPT_TOO_LONG`), or as `parse_prompt`.
    """
    chunks = count_chunks(prompt, count_tokens, field)
    if chunks > MAX_CHUNKS:
        raise InvalidArgumentError(
            f"{field} takes {chunks} chunks of {CHUNK_TOKENS} tokens; {MAX_CHUNKS} are the most",
            field=field,
            reason="PROMPT_TOO_LONG",
            metadata={"chunks": str(chunks), "limit": str(MAX_CHUNKS)},
        )
    return chunks


def escape(text: str) -> str:
    """Return a prompt that means a text literally."""
    # CLIP's tokenizers see lower case only, so a small "break" is the same word.
    return _BREAK.sub("break", re.sub(r"([()\[\]\\])", r"\\\1", text))


def _weigh(prompt: str, field: str) -> list[Span]:
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where the texts inside begin

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _PIECE.finditer(prompt):
        piece = match.group()
        if piece in opened:
            opened[piece].append(len(texts))
        elif match["weight"] is not None and opened["("]:
            close("(", _number(match["weight"], field))
        elif piece == ")" and opened["("]:
            close("(", _STEP)
        elif piece == "]" and opened["["]:
            close("[", 1 / _STEP)
        else:
            texts.append(piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece)
            weights.append(1.0)
    for bracket, factor in (("(", _STEP), ("[", 1 / _STEP)):
        while opened[bracket]:
            close(bracket, factor)
    for text, weight in zip(texts, weights, strict=True):
        if not 0 <= weight <= MAX_WEIGHT:
            raise _bad(f"{text.strip()[:40]!r} would weigh {weight:g}", field)
    return [Span(text, weight) for text, weight in zip(texts, weights, strict=True)]


def _number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _bad(f"{text[:40]!r} is no number", field) from None


def _merge(section: list[Span]) -> list[Span]:
    """Join neighbours of one weight, so that words are cut into tokens as they were written."""
    merged: list[Span] = []
    for span in section:
        if merged and merged[-1].weight == span.weight:
            merged[-1] = Span(merged[-1].text + span.text, span.weight)
        else:
            merged.append(span)
    return [span for span in merged if span.text.strip()]


def _bad(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"emphasis in {field}: {message}; weights are 0 to {MAX_WEIGHT:g}, and \\( and \\) are "
        "brackets without one",
        field=field,
        reason="BAD_EMPHASIS",
    )
