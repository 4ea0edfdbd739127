"""Whether a base's tokenizer keeps a trigger word: asked before anything is trained on it."""

import json
import unicodedata
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from toile.core.artifacts import ArtifactStore, read_manifest
from toile.core.errors import DataLossError, TriggerWordError

MAX_CHARACTERS = 32
MAX_TOKENS = 8
"""Of the 77 tokens of a prompt; more would leave too little room for the picture itself."""

# CLIP's rule for splitting a text into words, from its reference tokenizer.
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_END_OF_WORD = "</w>"


def check_trigger_word(word: str, tokenizer: Tokenizer | bytes | Path) -> str:
    """Return the trigger word as the tokenizer keeps it: lower-cased.

    `tokenizer` is a base's, or the bytes or path of its `tokenizer.json`.

    Raises:
        TriggerWordError: Metadata `why` is EMPTY, TOO_LONG, WHITESPACE, CONTROL_CHARACTER,
            NOT_KEPT, UNKNOWN_TOKEN or TOO_MANY_TOKENS.
    """
    _check_characters(word)
    if isinstance(tokenizer, Path):
        tokenizer = tokenizer.read_bytes()
    if isinstance(tokenizer, bytes):
        tokenizer = Tokenizer.from_buffer(tokenizer)
    lowered = word.lower()
    encoding = tokenizer.encode(lowered, add_special_tokens=False)
    ids = encoding.ids
    if _unknown_token(tokenizer) in encoding.tokens:
        raise _refused("UNKNOWN_TOKEN", f"the base's tokenizer does not know all of {word!r}")
    if _without_gaps(tokenizer.decode(ids, skip_special_tokens=True)) != lowered:
        raise _refused("NOT_KEPT", f"the base's tokenizer does not keep {word!r} as it is")
    if len(ids) > MAX_TOKENS:
        raise _refused(
            "TOO_MANY_TOKENS",
            f"the trigger word {word!r} becomes {len(ids)} tokens, at most {MAX_TOKENS} are "
            "allowed; take a shorter or more common word",
        )
    return lowered


def read_tokenizer(store: ArtifactStore, base_artifact: str) -> Tokenizer:
    """Return a base's first tokenizer, from `tokenizer.json` or CLIP's `vocab.json` + `merges.txt`.

    Raises:
        NotFoundError: The base has no tokenizer.
        DataLossError: Its files are damaged.
    """
    manifest = read_manifest(store, base_artifact)

    def read(name: str) -> bytes:
        return store.get(manifest.key(base_artifact, f"tokenizer/{name}"))

    try:
        if "tokenizer/tokenizer.json" in manifest.files:
            return Tokenizer.from_buffer(read("tokenizer.json"))
        return _clip_tokenizer(read("vocab.json"), read("merges.txt"))
    except ValueError as error:
        raise DataLossError(f"the tokenizer of {base_artifact} is damaged") from error


def _check_characters(word: str) -> None:
    if not word.strip():
        raise _refused("EMPTY", "the trigger word is empty")
    if len(word) > MAX_CHARACTERS:
        raise _refused(
            "TOO_LONG",
            f"the trigger word has {len(word)} characters, at most {MAX_CHARACTERS} are allowed",
        )
    if any(character.isspace() for character in word):
        raise _refused("WHITESPACE", f"the trigger word {word!r} has a space in it")
    if any(unicodedata.category(character).startswith("C") for character in word):
        raise _refused("CONTROL_CHARACTER", f"the trigger word {word!r} has an invisible character")


def _without_gaps(text: str) -> str:
    """Drop what decoding puts between words; a trigger word itself has no gaps."""
    return "".join(text.replace(_END_OF_WORD, "").split())


def _unknown_token(tokenizer: Tokenizer) -> str | None:
    token = getattr(tokenizer.model, "unk_token", None)
    return None if token is None else str(token)


def _clip_tokenizer(vocabulary: bytes, merges: bytes) -> Tokenizer:
    lines = merges.decode().split("\n")[1:]  # the first says the version
    pairs = [
        (first, second) for first, _, second in (line.partition(" ") for line in lines if line)
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=json.loads(vocabulary),
            merges=pairs,
            end_of_word_suffix=_END_OF_WORD,
            unk_token="<|endoftext|>",  # noqa: S106 - CLIP's own name for it
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _refused(why: str, message: str) -> TriggerWordError:
    return TriggerWordError(message, field="trigger_word", metadata={"why": why})
