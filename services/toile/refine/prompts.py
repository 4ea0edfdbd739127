"""Writing an edit into the prompt of the image, so that it is drawn as one thing.

"a red striped dress on a grey background", made blue, is "a blue striped dress on a grey
background": the words that change are replaced where they stand, and put before the noun or at
the end when there are none.
"""

import re
from collections.abc import Sequence

from toile.imaging.colour_words import ColourMention, describes_background, find_colours
from toile.refine.instructions import Edit, Operation
from toile.refine.words import BACKGROUND, GARMENT, LEXICON, Kind

_GARMENT_NOUNS = sorted(
    (
        word
        for word, entry in LEXICON.items()
        if entry in ((Kind.REGION, GARMENT), (Kind.REGION, "skirt"))
    ),
    key=len,
    reverse=True,
)
_NOUN = re.compile(rf"\b(?:{'|'.join(map(re.escape, [*_GARMENT_NOUNS, 'fabric', 'textile']))})\b")


_BACKGROUND_CLAUSE = re.compile(
    r"(?:,\s*|\s+)(?:on|against|over|in front of)\s+[^,]*ground\b|,[^,]*ground\b"
)
_NOT_CLOTH = re.compile(
    r"[\s-]+(?:{})\b".format(
        "|".join(
            re.escape(word)
            for word, (kind, value) in LEXICON.items()
            if kind is Kind.PATTERN_NOUN
            or (kind is Kind.REGION and value not in (GARMENT, "skirt"))
        )
    )
)
_FIGURES = {
    "striped": "stripes",
    "dotted": "dots",
    "checked": "checks",
    "plaid": "checks",
    "floral": "flowers",
    "zigzag": "zigzags",
}


def edit_prompt(prompt: str, edit: Edit) -> str:
    """The prompt of the image as it shall be; `prompt` is that of the image as it is."""
    prompt = " ".join(prompt.split())
    if edit.region == BACKGROUND:
        edited = _edit_background(prompt, edit.value)
    elif edit.region == GARMENT:
        edited = _edit_garment(prompt, edit)
    else:
        edited = _edit_part(prompt, edit)
    return _fix_articles(edited)


def _edit_background(prompt: str, value: str) -> str:
    for mention in _colours(prompt):
        if describes_background(prompt, mention):
            return prompt[: mention.start] + value + prompt[mention.end :]
    noun = re.search(r"\b(?:background|backdrop)\b", _searchable(prompt))
    if noun:
        return prompt[: noun.start()] + f"{value} " + prompt[noun.start() :]
    return f"{prompt} on a {value} background".strip()


def _edit_part(prompt: str, edit: Edit) -> str:
    """Only the words right before the part's own name are its; else a clause is added."""
    part = re.search(rf"\b{re.escape(edit.region)}\b", _searchable(prompt))
    if part is None:
        return _add_clause(prompt or "a garment", f"with {edit.value} {edit.region}")
    start = part.start()
    for mention in _colours(prompt):
        if edit.shade and not prompt[mention.end : start].strip():
            start = mention.start
    return prompt[:start] + f"{edit.value} " + prompt[part.start() :]


def _edit_garment(prompt: str, edit: Edit) -> str:
    if edit.operation is Operation.COLOUR:
        return _set_colour(prompt, edit.value)
    if edit.operation is Operation.MATERIAL:
        edited = _set_word(prompt, Kind.MATERIAL, edit.word)
        return _set_colour(edited, str(edit.shade)) if edit.shade else edited
    edited = _set_word(_without_figures(prompt), Kind.PATTERN, edit.word)
    if edit.shade is None:
        return edited
    if edit.word == "plain":
        return _set_colour(edited, str(edit.shade))
    return _add_clause(edited, f"with {edit.shade} {_FIGURES[edit.word]}")


def _set_colour(prompt: str, value: str) -> str:
    for mention in _colours(prompt):
        if _describes_cloth(prompt, mention):
            return prompt[: mention.start] + value + prompt[mention.end :]
    return _put_before_noun(prompt, value, before=(Kind.PATTERN, Kind.MATERIAL))


def _describes_cloth(prompt: str, mention: ColourMention) -> bool:
    """Say whether a colour is the garment's: not the background's, figures' or one part's."""
    if describes_background(prompt, mention):
        return False
    return _NOT_CLOTH.match(_searchable(prompt), mention.end) is None


def _set_word(prompt: str, kind: Kind, word: str) -> str:
    """Replace the words of a kind by one word; the second and later are left out."""
    spans = _spans(prompt, (kind,))
    if not spans:
        later = (Kind.MATERIAL,) if kind is Kind.PATTERN else ()
        return _put_before_noun(prompt, word, before=later)
    for start, end in reversed(spans[1:]):
        prompt = prompt[:start] + prompt[end:].lstrip()
    start, end = spans[0]
    return prompt[:start] + word + prompt[end:]


def _put_before_noun(prompt: str, value: str, *, before: Sequence[Kind]) -> str:
    noun = _NOUN.search(_searchable(prompt))
    if noun is None:
        return f"{prompt}, {value} garment" if prompt else f"a {value} garment"
    # Only words that lead up to the noun: "a *striped lace* dress".
    place = noun.start()
    for start, end in reversed(_spans(prompt, before)):
        if end <= place and not prompt[end:place].strip(" -"):
            place = start
    return prompt[:place] + f"{value} " + prompt[place:]


def _add_clause(prompt: str, clause: str) -> str:
    """Put a clause before that of the background."""
    place = _BACKGROUND_CLAUSE.search(_searchable(prompt))
    if place is None:
        return f"{prompt} {clause}"
    return f"{prompt[: place.start()]} {clause}{prompt[place.start() :]}"


def _without_figures(prompt: str) -> str:
    """The prompt without "with white dots"."""
    for start, end in reversed(_spans(prompt, (Kind.PATTERN_NOUN,))):
        with_ = re.search(r"\s*\bwith\s+(?:[\w-]+\s+){0,3}$", prompt[:start])
        if with_:
            prompt = prompt[: with_.start()] + prompt[end:]
    return prompt


def _spans(prompt: str, kinds: Sequence[Kind]) -> list[tuple[int, int]]:
    """Where words of these kinds stand, but for those that say how the background is."""
    phrases = [phrase for phrase, (kind, _) in LEXICON.items() if kind in kinds]
    if not phrases:
        return []
    either = "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))
    pattern = rf"\b(?:{either})\b(?!\s+(?:[\w-]+\s+)?(?:background|backdrop)\b)"
    return [match.span() for match in re.finditer(pattern, _searchable(prompt))]


def _colours(prompt: str) -> list[ColourMention]:
    return find_colours(_searchable(prompt))


def _searchable(prompt: str) -> str:
    """The prompt in lower case, with trigger words such as `<lace>` hidden; of equal length."""
    lowered = prompt.lower() if len(prompt.lower()) == len(prompt) else prompt
    return re.sub(r"<[^<>]*>", lambda match: "_" * len(match.group()), lowered)


def _fix_articles(text: str) -> str:
    text = re.sub(r"\b([Aa])n (?=[^aeiouAEIOU\W])", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)


def names_material(prompt: str, material: str) -> bool:
    """Say whether a prompt says what the garment is made of, and it is this material."""
    words = _searchable(prompt)
    return any(LEXICON[words[s:e]][1] == material for s, e in _spans(prompt, (Kind.MATERIAL,)))
