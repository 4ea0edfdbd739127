"""The words that instructions are made of."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from toile.imaging.renderer.vocabulary import GARMENTS, MATERIALS, PATTERN_SYNONYMS

GARMENT = "garment"
"""The region of everything but the background."""

BACKGROUND = "background"


class Kind(StrEnum):
    """What part a word plays in an instruction."""

    ADD = "add"
    REMOVE = "remove"
    TO = "to"
    OF = "of"
    FILLER = "filler"
    REGION = "region"
    ASPECT = "aspect"
    COLOUR = "colour"
    PATTERN = "pattern"
    PATTERN_NOUN = "pattern noun"
    MATERIAL = "material"


_FILLERS = """
a an the it its it's this that all of's is be look looks like please can could would you i i'd want
we need have has having make makes making turn change set paint dye colour-in recolour recolor
switch swap replace give get let let's redo render as from out completely entirely whole entire my
his her their more very now then instead just so style patterned with and
"""

_REGIONS: Mapping[str, tuple[str, ...]] = {
    GARMENT: (
        *GARMENTS,
        *("garment", "clothes", "clothing", "outfit", "piece", "item", "product", "gown", "frock"),
        *("blouse", "tee", "tshirt", "t shirt", "jeans", "trousers", "coat", "blazer", "cap"),
        *("jumper", "sweater", "swatch", "everything", "thing"),
    ),
    "body": ("body", "bodice", "torso", "top", "front", "chest", "top part", "upper part"),
    "sleeves": ("sleeves", "sleeve", "arms", "arm"),
    "collar": ("collar", "collars", "lapel", "lapels", "neckline", "neck"),
    "skirt": ("skirt", "skirt part", "lower part", "bottom part"),
    "legs": ("legs", "leg"),
    "waistband": ("waistband", "waist", "belt", "sash"),
    "trim": ("trim", "trims", "hat band", "hatband", "bobble", "cuffs", "cuff"),
    "brim": ("brim",),
    BACKGROUND: ("background", "backdrop", "wall", "backdrop wall"),
}

_PATTERN_NOUNS: Mapping[str, tuple[str, ...]] = {
    "striped": ("stripes", "stripe", "pinstripes"),
    "dotted": ("dots", "dot", "polka dots", "spots", "polka-dots"),
    "checked": ("checks", "check", "squares"),
    "plaid": ("tartans",),
    "floral": ("flowers", "flower", "florals", "blossoms", "roses"),
    "zigzag": ("zigzags", "zig-zags", "chevrons"),
}

_PATTERN_ADJECTIVES: Mapping[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "unpatterned"),
    "dotted": ("spotted", "polka-dot", "polka-dotted", "polka dotted", "dotty"),
    "striped": ("stripy", "stripey", "pinstriped"),
    "checked": ("chequered", "checkered"),
    "floral": ("flowery",),
    "zigzag": ("zig-zag", "zig zag"),
}

_MATERIALS: Mapping[str, tuple[str, ...]] = {
    "lace": ("lacy",),
    "knit": ("knitted", "knitwear", "wool", "woollen", "woolen"),
    "satin": ("silk", "silky"),
    "denim": ("jean",),
}

_ASPECTS: Mapping[str, tuple[str, ...]] = {
    "colour": ("colour", "color", "colours", "colors", "shade", "tone"),
    "pattern": ("pattern", "patterns", "print", "prints", "motif", "design"),
    "material": ("material", "fabric", "cloth", "textile", "texture"),
}


def _lexicon() -> Mapping[str, tuple[Kind, str]]:
    words: dict[str, tuple[Kind, str]] = {word: (Kind.FILLER, word) for word in _FILLERS.split()}
    for phrase in ("add", "put", "draw", "cover"):
        words[phrase] = (Kind.ADD, phrase)
    for phrase in ("remove", "delete", "drop", "take off", "take away", "lose", "without", "no"):
        words[phrase] = (Kind.REMOVE, phrase)
    for phrase in ("to", "into", "in"):
        words[phrase] = (Kind.TO, phrase)
    for phrase in ("of", "on", "onto", "for", "at"):
        words[phrase] = (Kind.OF, phrase)
    groups: tuple[tuple[Kind, Mapping[str, tuple[str, ...]]], ...] = (
        (Kind.REGION, _REGIONS),
        (Kind.ASPECT, _ASPECTS),
        (Kind.PATTERN, PATTERN_SYNONYMS),
        (Kind.PATTERN, _PATTERN_ADJECTIVES),
        (Kind.PATTERN_NOUN, _PATTERN_NOUNS),
        (Kind.MATERIAL, {name: (name,) for name in MATERIALS}),
        (Kind.MATERIAL, _MATERIALS),
    )
    for kind, group in groups:
        for value, phrases in group.items():
            for phrase in phrases:
                words[phrase] = (kind, value)
    return MappingProxyType(words)


LEXICON: Mapping[str, tuple[Kind, str]] = _lexicon()
"""Word or phrase -> its part and its value. Colours are found by `imaging.colour_words`."""

LONGEST_PHRASE_WORDS = max(phrase.count(" ") + 1 for phrase in LEXICON)
