"""Colours as people write them: "navy blue", "dark red", "burgundy", "gray".

Every spelling leads to one of `NAMED_COLOURS`, darker or lighter where the word says so.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from toile.imaging.colours import NAMED_COLOURS, RGB, lab_to_rgb, rgb_to_lab

_MODIFIERS: dict[str, str] = {
    "dark": "dark",
    "deep": "dark",
    "light": "light",
    "pale": "light",
    "pastel": "light",
    "soft": "light",
    "bright": "",
    "vivid": "",
    "pure": "",
}

# Spelling -> (darker or lighter, named colour).
_SYNONYMS: dict[str, tuple[str, str]] = {
    "gray": ("", "grey"),
    "silver": ("light", "grey"),
    "charcoal": ("dark", "grey"),
    "ivory": ("", "white"),
    "cream": ("light", "beige"),
    "off-white": ("", "white"),
    "off white": ("", "white"),
    "scarlet": ("", "red"),
    "crimson": ("", "red"),
    "blood red": ("dark", "red"),
    "burgundy": ("dark", "red"),
    "maroon": ("dark", "red"),
    "wine red": ("dark", "red"),
    "coral": ("light", "orange"),
    "peach": ("light", "orange"),
    "rust": ("dark", "orange"),
    "mustard": ("dark", "yellow"),
    "gold": ("dark", "yellow"),
    "golden": ("dark", "yellow"),
    "emerald": ("", "green"),
    "olive": ("dark", "green"),
    "forest": ("dark", "green"),
    "bottle green": ("dark", "green"),
    "mint": ("light", "green"),
    "sage": ("light", "green"),
    "turquoise": ("light", "teal"),
    "aqua": ("light", "teal"),
    "cyan": ("light", "teal"),
    "petrol": ("dark", "teal"),
    "royal blue": ("", "blue"),
    "cobalt": ("", "blue"),
    "azure": ("light", "blue"),
    "sky": ("light", "blue"),
    "baby blue": ("light", "blue"),
    "indigo": ("", "navy"),
    "midnight blue": ("", "navy"),
    "violet": ("", "purple"),
    "plum": ("dark", "purple"),
    "aubergine": ("dark", "purple"),
    "lilac": ("light", "purple"),
    "lavender": ("light", "purple"),
    "rose": ("", "pink"),
    "hot pink": ("dark", "pink"),
    "fuchsia": ("dark", "pink"),
    "magenta": ("dark", "pink"),
    "tan": ("dark", "beige"),
    "camel": ("dark", "beige"),
    "khaki": ("dark", "beige"),
    "sand": ("", "beige"),
    "chocolate": ("dark", "brown"),
}

# Words that may be followed by the plain name of the colour they are a kind of: "navy blue".
_KIND_OF: dict[str, str] = {
    "navy": "blue",
    "indigo": "blue",
    "teal": "green",
    **{word: name for word, (_, name) in _SYNONYMS.items() if " " not in word},
}

# Where a line through CIELAB misses: its blues turn purple on the way to white.
_MEASURED: dict[tuple[str, str], RGB] = {
    ("light", "blue"): (128, 178, 232),
    ("dark", "pink"): (214, 64, 126),  # fuchsia, not dust
}

_LIGHTNESS_STEP = 16.0  # CIELAB L* between "red" and "dark red"


@dataclass(frozen=True)
class Shade:
    """A colour as the models understand it: a named colour, perhaps `dark` or `light`."""

    name: str
    modifier: str = ""

    def __str__(self) -> str:
        return f"{self.modifier} {self.name}".strip()

    @property
    def rgb(self) -> RGB:
        """The sRGB triple that stands for it."""
        if (self.modifier, self.name) in _MEASURED:
            return _MEASURED[self.modifier, self.name]
        lab = rgb_to_lab(NAMED_COLOURS[self.name]).astype(np.float64)
        step = {"dark": -_LIGHTNESS_STEP, "light": _LIGHTNESS_STEP}.get(self.modifier, 0.0)
        lightness = float(np.clip(lab[0] + step, 4.0, 97.0))
        # A pale colour is less saturated, a dark one can hold no more than its lightness lets it.
        chroma = {"dark": 0.85, "light": 0.75}.get(self.modifier, 1.0)
        return lab_to_rgb([lightness, lab[1] * chroma, lab[2] * chroma])


@dataclass(frozen=True)
class ColourMention:
    """A colour in a text: characters `start` to `end`."""

    start: int
    end: int
    shade: Shade


def find_colours(text: str) -> list[ColourMention]:
    """All colours that a text names, in order; longest spellings win."""
    mentions: list[ColourMention] = []
    for mention in _mentions(text):
        if not mentions or mention.start >= mentions[-1].end:
            mentions.append(mention)
    return mentions


def shade_of(words: str) -> Shade | None:
    """The colour that the whole of `words` names, if it names one."""
    mentions = find_colours(words.strip())
    if len(mentions) == 1 and (mentions[0].start, mentions[0].end) == (0, len(words.strip())):
        return mentions[0].shade
    return None


def garment_colour(prompt: str) -> Shade | None:
    """The colour that a prompt gives the garment: the first that is not the background's.

    Returns None when it names none, or names only colours of the background.
    """
    for mention in find_colours(prompt):
        if not describes_background(prompt, mention):
            return mention.shade
    return None


def describes_background(text: str, mention: ColourMention) -> bool:
    """Say whether a mentioned colour is followed by a word for the background."""
    return (
        re.match(r"[\s,-]*(?:\w+\s+)?(?:back)?(?:ground|drop)\b", text[mention.end :]) is not None
    )


def _mentions(text: str) -> Iterator[ColourMention]:
    lowered = text.lower()
    for match in _pattern().finditer(lowered):
        modifier, word = match["modifier"] or "", match["word"]
        own, name = _SYNONYMS.get(word, ("", word))
        # "navy blue" is one colour, navy: the name that follows belongs to it.
        tail = re.compile(rf"[ -]{_KIND_OF.get(word, name)}\b").match(lowered, match.end("word"))
        end = tail.end() if tail and word in _KIND_OF else match.end()
        shade = Shade(name, _MODIFIERS.get(modifier, "") or own)
        yield ColourMention(match.start(), end, shade)


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    words = sorted({*_SYNONYMS, *NAMED_COLOURS}, key=len, reverse=True)
    either = "|".join(re.escape(word) for word in words)
    modifiers = "|".join(_MODIFIERS)
    return re.compile(
        rf"\b(?:(?P<modifier>{modifiers})[ -])?(?P<word>{either})(?:ish|-coloured|-colored)?\b"
    )
