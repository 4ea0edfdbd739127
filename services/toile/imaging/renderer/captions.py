"""Captions in the words a person would type, with attributes left out at random."""

from collections.abc import Mapping

import numpy as np

from toile.imaging.renderer.vocabulary import PATTERN_SYNONYMS

_FABRIC_NOUNS = ("fabric", "fabric", "fabric", "textile", "fabric swatch")
_PLURAL = ("pants", "shorts")


def make_caption(rng: np.random.Generator, names: Mapping[str, str]) -> str:
    """One caption for a render's attributes. Colour and category are nearly always named."""
    words: list[str] = []
    if rng.random() < 0.94:
        words.append(names["colour"])
    words += _pattern_words(rng, names)
    words.append(noun(rng, names["category"]))
    phrase = " ".join(words)
    phrase = _with_opening(rng, phrase, names["category"])
    if rng.random() < 0.55:
        article = "a " if rng.random() < 0.5 else ""
        plain = "plain " if rng.random() < 0.15 else ""
        phrase += f" on {article}{plain}{names['background']} background"
    return phrase


def noun(rng: np.random.Generator, category: str) -> str:
    """The word for a category; a swatch has several."""
    return str(rng.choice(_FABRIC_NOUNS)) if category == "fabric" else category


def _pattern_words(rng: np.random.Generator, names: Mapping[str, str]) -> list[str]:
    pattern, material = names["pattern"], names["material"]
    words = []
    says_pattern = 0.25 if pattern == "plain" else 0.95
    if material == "lace":
        says_pattern = 0.6
    if rng.random() < says_pattern:
        words.append(str(rng.choice(PATTERN_SYNONYMS[pattern])))
    if rng.random() < (0.12 if material == "cotton" else 0.95):
        words.append(material)
    return words


def _with_opening(rng: np.random.Generator, phrase: str, category: str) -> str:
    article = "" if category in _PLURAL else ("an " if phrase[0] in "aeiou" else "a ")
    if category == "fabric" and rng.random() < 0.6:
        article = ""
    choice = rng.random()
    if choice < 0.45:
        return article + phrase
    if choice < 0.75:
        return phrase
    return f"a picture of {article}{phrase}"
