"""Which words make a picture one for adults.

Only words are judged, never pixels: what somebody uploads with a harmless description, or what a
model draws unasked, is not noticed. The list is short on purpose. It holds what is plainly
meant, in English; "nude" alone is a colour of shoes and tulle, so it counts only where it is said
of a body or of a picture. A term matches at word boundaries, in any case, and whatever stands
between its words: "full-frontal", "full_frontal" and "FULL  FRONTAL" are one term.
"""

import re
import unicodedata
from collections.abc import Iterable

_SEPARATOR = r"[\W_\d]+"  # digits too: emphasis is written "(words:1.2)"
_BARE = r"(?:nude|naked)"
_BODY = (
    "(?:woman|women|man|men|girls?|boys?|lady|ladies|child|children|teens?|teenagers?|person|"
    "people|females?|males?|figures?|models?|body|bodies|torsos?|breasts?)"
)
_ADJECTIVE = "(?:young|old|adult|beautiful|female|male|standing|sitting|lying|reclining|human)"
_POSTURE = "(?:is|are|fully|completely|standing|sitting|lying|posing|kneeling|dancing)"
_CLAUSE_ENDS = r"(?=[\W_]*$|[ ]*[.,;:!?)\]|}]|[\W_]+(?:in|on|at|by|from|under)[\W_])"

TERMS: tuple[str, ...] = (
    "nsfw",
    "nudity",
    "nudes",
    "full frontal",
    "fully nude",
    "completely nude",
    "fully naked",
    "stark naked",
    "nude photo",
    "nude photograph",
    "nude portrait",
    "nude painting",
    "nude scene",
    "nude art",
    "topless",
    "bare breasts",
    "bare breasted",
    "genitals",
    "genitalia",
    "penis",
    "vagina",
    "vulva",
    "erotic",
    "erotica",
    "hentai",
    "porn",
    "porno",
    "pornography",
    "pornographic",
    "hardcore sex",
    "having sex",
    "sex act",
    "sexual act",
    "sexual intercourse",
    "sexually explicit",
    "masturbation",
    "orgasm",
    "blood and gore",
    "gory",
    "beheading",
    "decapitated",
    "dismembered",
    "disembowelled",
    "mutilated corpse",
)
"""Terms as words; spaces stand for whatever separates them."""


def restricted_term(text: str) -> str | None:
    """Return what makes a text one for adults, as the text has it; None if nothing does."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    match = _PATTERN.search(plain)
    return None if match is None else match.group()


def _pattern(terms: Iterable[str]) -> re.Pattern[str]:
    phrases = [r"[\W_]*".join(re.escape(word) for word in term.split()) for term in terms]
    # "nude heels on a model" is no nude model: what stands between is named.
    phrases.append(f"{_BARE}{_SEPARATOR}(?:{_ADJECTIVE}{_SEPARATOR})*{_BODY}")
    phrases.append(f"{_BODY}{_SEPARATOR}(?:{_POSTURE}{_SEPARATOR})*{_BARE}{_CLAUSE_ENDS}")
    # An underscore separates words here, so \b, to which it is a letter, does not do.
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(phrases)})(?![^\W_])")


_PATTERN = _pattern(TERMS)
