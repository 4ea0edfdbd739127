"""Understanding an instruction: "make the sleeves dark red", "add white dots", "as denim".

No model: words are looked up and fitted to one change of one region. What does not fit is refused
with an error that says why, because a guess costs the caller minutes of drawing.
"""

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from toile.core.errors import InvalidArgumentError
from toile.imaging.colour_words import Shade, find_colours
from toile.imaging.colours import NAMED_COLOURS
from toile.refine.words import GARMENT, LEXICON, LONGEST_PHRASE_WORDS, Kind

EXAMPLES = (
    "make it blue",
    "make the sleeves dark red",
    "turn the background grey",
    "make it striped",
    "add white dots",
    "change the fabric to denim",
)

_VALUES = frozenset({Kind.COLOUR, Kind.PATTERN, Kind.PATTERN_NOUN, Kind.MATERIAL})


class Operation(StrEnum):
    """What an edit changes."""

    COLOUR = "colour"
    PATTERN = "pattern"
    MATERIAL = "material"


@dataclass(frozen=True)
class Edit:
    """One change of one region.

    region: `garment`, `background` or a part such as `sleeves`. word: the pattern or material;
    empty for a change of colour. shade: the colour, of the pattern's figures when there is one.
    """

    operation: Operation
    region: str
    word: str = ""
    shade: Shade | None = None

    @property
    def value(self) -> str:
        """What the region becomes, in words."""
        return " ".join(part for part in (str(self.shade or ""), self.word) if part)


@dataclass(frozen=True)
class _Token:
    kind: Kind
    value: str
    shade: Shade | None = None


def parse_instruction(text: str) -> Edit:
    """Understand an instruction.

    Raises:
        InvalidArgumentError: It is not understood (`INSTRUCTION_NOT_UNDERSTOOD`), or asks for
            more than one change or can be read in several ways (`INSTRUCTION_AMBIGUOUS`).
    """
    tokens = _without_descriptions(_tokens(text))
    values = [token for token in tokens if token.kind in _VALUES]
    region = _region(tokens)
    if any(token.kind is Kind.REMOVE for token in tokens):
        return _removal(text, tokens, values, region)
    if not values:
        raise _not_understood(f"{text!r} does not say what to change to")
    edit = _edit(tokens, values, region)
    _check_aspects(tokens, edit)
    return edit


def _edit(tokens: Sequence[_Token], values: Sequence[_Token], region: str) -> Edit:
    words = [token for token in values if token.kind is not Kind.COLOUR]
    colours = [token for token in values if token.kind is Kind.COLOUR]
    if len(words) > 1 or len(colours) > 1:
        wanted = ", ".join(token.value for token in values)
        raise _ambiguous(f"it names several changes ({wanted}); ask for one at a time")
    if not words:
        return Edit(Operation.COLOUR, region, shade=colours[0].shade)
    (word,) = words
    shade = colours[0].shade if colours else None
    if colours and not _belongs(tokens, colours[0], word):
        raise _ambiguous(
            f"is {colours[0].value} the colour of the cloth or of what is {word.value}? "
            "Ask for one at a time"
        )
    operation = Operation.MATERIAL if word.kind is Kind.MATERIAL else Operation.PATTERN
    return Edit(operation, region, word.value, shade)


def _belongs(tokens: Sequence[_Token], colour: _Token, word: _Token) -> bool:
    """Say whether a colour is plainly that of a pattern's figures or of a material."""
    distance = tokens.index(word) - tokens.index(colour)
    if word.value == "plain":
        return abs(distance) == 1
    return distance == 1 and word.kind is not Kind.PATTERN


def _removal(text: str, tokens: Sequence[_Token], values: Sequence[_Token], region: str) -> Edit:
    patterned = [t for t in values if t.kind is not Kind.MATERIAL and t.kind is not Kind.COLOUR]
    aspects = [t for t in tokens if t.kind is Kind.ASPECT and t.value == "pattern"]
    if len(patterned) == len(values) and len(patterned) + len(aspects) > 0:
        return Edit(Operation.PATTERN, region, "plain")
    raise _not_understood(f"{text!r} asks to remove something; only a pattern can be removed")


def _region(tokens: Sequence[_Token]) -> str:
    named: list[str] = []
    inside = False  # after "of": where the part belongs, as in "the sleeves of the dress"
    for token in tokens:
        inside = inside or token.kind is Kind.OF
        if token.kind is Kind.REGION and not (inside and named):
            named.append(token.value)
    parts = dict.fromkeys(value for value in named if value != GARMENT)
    if len(parts) > 1:
        raise _ambiguous(f"it names several regions ({', '.join(parts)}); ask for one at a time")
    return next(iter(parts), GARMENT)


def _check_aspects(tokens: Sequence[_Token], edit: Edit) -> None:
    """Refuse "change the colour to striped". Fabric may have any value: it is the garment."""
    for token in tokens:
        is_other = token.kind is Kind.ASPECT and token.value != edit.operation.value
        if is_other and token.value != "material" and edit.operation is not Operation.PATTERN:
            raise _ambiguous(f"{edit.value!r} is a {edit.operation}, not a {token.value}")
        if is_other and token.value == "colour":
            raise _ambiguous(f"{edit.value!r} is a {edit.operation}, not a colour")


def _without_descriptions(tokens: Sequence[_Token]) -> list[_Token]:
    """Leave out what says how a region is now.

    As in "the *red* sleeves blue", "from *red* to blue", "stripes on the *white* dress".
    """
    return [
        token
        for place, token in enumerate(tokens)
        if token.kind not in _VALUES or not _is_description(tokens[:place], tokens[place + 1 :])
    ]


def _is_description(before: Sequence[_Token], after: Sequence[_Token]) -> bool:
    rest = list(itertools.dropwhile(lambda token: token.kind in _VALUES, after))
    if not rest or rest[0].kind not in (Kind.REGION, Kind.ASPECT, Kind.TO):
        return False
    if any(token.kind in _VALUES for token in rest[1:]):
        return True
    of = [place for place, token in enumerate(before) if token.kind is Kind.OF]
    return bool(of) and any(token.kind in _VALUES for token in before[: of[-1]])


def _tokens(text: str) -> list[_Token]:
    """The words that mean something; colours first, then the longest phrases."""
    text = re.sub(r"(?i)\b(replace|swap|exchange)\b(.*?)\b(?:with|for|by)\b", r"replace\2to", text)
    tokens: list[_Token] = []
    unknown: list[str] = []
    start = 0
    for mention in find_colours(text):
        tokens += _look_up(text[start : mention.start], unknown)
        tokens.append(_Token(Kind.COLOUR, str(mention.shade), mention.shade))
        start = mention.end
    tokens += _look_up(text[start:], unknown)
    if unknown:
        raise _not_understood(f"it is not clear what {_quoted(unknown)} means{_hint(unknown)}")
    return [token for token in tokens if token.kind is not Kind.FILLER]


def _look_up(text: str, unknown: list[str]) -> list[_Token]:
    words = re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text.lower())  # noqa: RUF001 typed quotes
    words = [re.sub("['’]s$", "", word) for word in words]  # noqa: RUF001 "the dress's"
    tokens: list[_Token] = []
    place = 0
    while place < len(words):
        for length in range(min(LONGEST_PHRASE_WORDS, len(words) - place), 0, -1):
            found = LEXICON.get(" ".join(words[place : place + length]))
            if found:
                tokens.append(_Token(*found))
                place += length
                break
        else:
            unknown.append(words[place])
            place += 1
    return tokens


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f'"{word[:40]}"' for word in words[:3])


def _hint(words: Sequence[str]) -> str:
    known = [*NAMED_COLOURS, *(phrase for phrase, (kind, _) in LEXICON.items() if kind in _NAMES)]
    near = difflib.get_close_matches(words[0], known, n=1, cutoff=0.72)
    return f' (perhaps "{near[0]}"?)' if near else ""


_NAMES = _VALUES | {Kind.REGION, Kind.ASPECT}


def _not_understood(message: str) -> InvalidArgumentError:
    examples = "; ".join(EXAMPLES)
    return InvalidArgumentError(
        f"the instruction is not understood: {message}. Such as these are: {examples}",
        field="instruction",
        reason="INSTRUCTION_NOT_UNDERSTOOD",
        metadata={"examples": examples},
    )


def _ambiguous(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the instruction can be read in several ways: {message}",
        field="instruction",
        reason="INSTRUCTION_AMBIGUOUS",
    )
