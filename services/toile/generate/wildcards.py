"""Prompts that vary from image to image: `{red|blue}` and `__name__`, chosen by the image's seed.

`{a|b}` takes one of its variants, `__name__` one value of the list of that name; variants and
values may hold both again. Braces without a bar, and `{`, `|`, `}` behind a backslash, are
literal; so is all else, emphasis such as `(red:1.2)` too. The syntax is that of the Dynamic
Prompts extension of AUTOMATIC1111's web UI, as far as it goes.

The n-th choice of an image is made by SHA-256 of its seed and n, so it is the same on every
machine and with every version of Python.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from toile.core.errors import InvalidArgumentError

MOST_VALUES = 1000
MOST_VALUE_CHARACTERS = 2000
MOST_LIST_CHARACTERS = 100_000
"""Characters in all lists of a request."""

_MOST_CHOICES = 500  # of one prompt: lists that hold one another soon unfold without end
_MOST_DEPTH = 20
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9-]|_(?!_))*"
_TOKEN = re.compile(rf"\\[{{|}}]|__(?P<name>{_NAME})__|[{{|}}]")


@dataclass(frozen=True)
class _List:
    """`__name__`."""

    name: str


@dataclass(frozen=True)
class _Variants:
    """`{…|…}`."""

    options: Sequence["_Text"]


_Text: TypeAlias = list[str | _List | _Variants]


def check_wildcards(wildcards: Mapping[str, Sequence[str]]) -> None:
    """Refuse lists that no prompt could use.

    Raises:
        InvalidArgumentError: A name cannot stand in a prompt, a list is empty or too long.
    """
    for name, values in wildcards.items():
        if not re.fullmatch(_NAME, name):
            raise _refused(
                f"a wildcard's name is letters, digits, single _ and -, not {name[:80]!r}",
                "BAD_WILDCARD",
                name,
                field="wildcards",
            )
        if not 1 <= len(values) <= MOST_VALUES:
            raise _refused(
                f"wildcard {name} must have 1 to {MOST_VALUES} values, not {len(values)}",
                "BAD_WILDCARD",
                name,
                field="wildcards",
            )
        longest = max(map(len, values))
        if longest > MOST_VALUE_CHARACTERS:
            raise _refused(
                f"a value of wildcard {name} has {longest} characters; {MOST_VALUE_CHARACTERS} "
                "are the most",
                "WILDCARDS_TOO_LONG",
                name,
                field="wildcards",
            )
    total = sum(len(value) for values in wildcards.values() for value in values)
    if total > MOST_LIST_CHARACTERS:
        raise InvalidArgumentError(
            f"the wildcards have {total} characters; {MOST_LIST_CHARACTERS} are the most",
            field="wildcards",
            reason="WILDCARDS_TOO_LONG",
        )


def check_template(template: str, wildcards: Mapping[str, Sequence[str]]) -> None:
    """Make sure that all lists that a prompt can come to are there, whatever is chosen.

    Raises:
        InvalidArgumentError: One is not (`UNKNOWN_WILDCARD`), or braces nest too deeply.
    """
    todo, seen = [template], {template}
    while todo:
        for name in _names(_parse(todo.pop())):
            if name not in wildcards:
                known = ", ".join(sorted(wildcards)) or "none"
                raise _refused(
                    f"there is no wildcard __{name}__; the request has: {known}",
                    "UNKNOWN_WILDCARD",
                    name,
                )
            new = set(wildcards[name]) - seen
            seen |= new
            todo.extend(new)


def expand(
    template: str, wildcards: Mapping[str, Sequence[str]], seed: int, *, most_characters: int
) -> str:
    """Return the prompt of the image with this seed.

    Raises:
        InvalidArgumentError: A list is unknown (`UNKNOWN_WILDCARD`), or what comes out is too
            long or never ends (`EXPANSION_TOO_LONG`).
    """
    return _Expansion(wildcards, seed, most_characters).of(_parse(template), depth=0)


class _Expansion:
    """One prompt in the making; it counts its choices."""

    def __init__(
        self, wildcards: Mapping[str, Sequence[str]], seed: int, most_characters: int
    ) -> None:
        self._wildcards, self._seed, self._most_characters = wildcards, seed, most_characters
        self._choices = count()

    def of(self, text: _Text, depth: int) -> str:
        pieces = []
        for part in text:
            if isinstance(part, str):
                pieces.append(part)
            else:
                pieces.append(self.of(self._chosen(part, depth), depth + 1))
            if sum(map(len, pieces)) > self._most_characters:
                raise self._too_long()
        return "".join(pieces)

    def _chosen(self, part: _List | _Variants, depth: int) -> _Text:
        number = next(self._choices)
        if number >= _MOST_CHOICES or depth >= _MOST_DEPTH:
            raise self._too_long()
        if isinstance(part, _Variants):
            return part.options[self._index(number, len(part.options))]
        values = self._wildcards.get(part.name)
        if not values:
            raise _refused(f"there is no wildcard __{part.name}__", "UNKNOWN_WILDCARD", part.name)
        return _parse(values[self._index(number, len(values))])

    def _index(self, number: int, options: int) -> int:
        digest = hashlib.sha256(f"{self._seed}/{number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % options

    def _too_long(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"with its wildcards the prompt of seed {self._seed} has more than "
            f"{self._most_characters} characters or {_MOST_CHOICES} choices",
            field="prompt",
            reason="EXPANSION_TOO_LONG",
        )


def _parse(template: str) -> _Text:
    """Return a prompt's parts; a brace that is never closed stands for itself."""
    stack: list[list[_Text]] = [[[]]]  # of open braces, the options so far; the text itself below
    end = 0
    for token in _TOKEN.finditer(template):
        _add(stack[-1][-1], template[end : token.start()])
        end = token.end()
        mark = token.group()
        if token["name"]:
            stack[-1][-1].append(_List(token["name"]))
        elif mark == "{" and len(stack) <= _MOST_DEPTH:
            stack.append([[]])
        elif mark == "|" and len(stack) > 1:
            stack[-1].append([])
        elif mark == "}" and len(stack) > 1:
            options = stack.pop()
            if len(options) > 1:
                stack[-1][-1].append(_Variants(options))
            else:
                _extend(stack[-1][-1], ["{", *options[0], "}"])
        else:
            _add(stack[-1][-1], mark.removeprefix("\\"))
    _add(stack[-1][-1], template[end:])
    while len(stack) > 1:
        options = stack.pop()
        _add(stack[-1][-1], "{")
        for place, option in enumerate(options):
            _extend(stack[-1][-1], ["|", *option] if place else option)
    return stack[0][0]


def _add(text: _Text, piece: str) -> None:
    if piece:
        text.append(piece)


def _extend(text: _Text, parts: _Text) -> None:
    text.extend(part for part in parts if part)


def _names(text: _Text) -> Iterator[str]:
    for part in text:
        if isinstance(part, _List):
            yield part.name
        elif isinstance(part, _Variants):
            for option in part.options:
                yield from _names(option)


def _refused(
    message: str, reason: str, wildcard: str, *, field: str = "prompt"
) -> InvalidArgumentError:
    return InvalidArgumentError(
        message, field=field, reason=reason, metadata={"wildcard": wildcard[:80]}
    )
