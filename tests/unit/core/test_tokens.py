import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from toile.core.artifacts import open_store, publish
from toile.core.errors import DataLossError, NotFoundError, TriggerWordError
from toile.core.settings import Settings
from toile.core.tokens import check_trigger_word, read_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's own tokenizer, as its recipe writes it."""
    pytest.importorskip("transformers", reason="the compute extra is not installed")
    from toile.diffusion.tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("word", ["<lace>", "sks", "rose-lace", "3d", "été", "<flores_7>"])
def test_usual_trigger_words_are_kept(tokenizer_folder: Path, word: str) -> None:
    assert check_trigger_word(word, tokenizer_folder / "tokenizer.json") == word


def test_a_trigger_word_is_lower_cased(tokenizer_folder: Path) -> None:
    data = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert check_trigger_word("<LaCe>", data) == "<lace>"


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("", "EMPTY"),
        ("  ", "EMPTY"),
        ("a" * 33, "TOO_LONG"),
        ("two words", "WHITESPACE"),
        ("line\nbreak", "WHITESPACE"),
        ("no\u00a0break", "WHITESPACE"),
        ("zero\u200bwidth", "CONTROL_CHARACTER"),
        ("bell\x07", "CONTROL_CHARACTER"),
        ("nul\x00", "CONTROL_CHARACTER"),
        ("\ud800", "CONTROL_CHARACTER"),
        ("<|endoftext|>", "UNKNOWN_TOKEN"),
        ("<|startoftext|>", "NOT_KEPT"),
        ("e\u0301toile", "NOT_KEPT"),
        ("zqxjkvbzqxjkvb", "TOO_MANY_TOKENS"),
        ("日本語の布", "TOO_MANY_TOKENS"),
    ],
)
def test_a_word_that_would_be_lost_is_refused(tokenizer_folder: Path, word: str, why: str) -> None:
    with pytest.raises(TriggerWordError) as caught:
        check_trigger_word(word, tokenizer_folder / "tokenizer.json")
    assert caught.value.metadata == {"field": "trigger_word", "why": why}
    assert len(caught.value.message.splitlines()) == 1


def test_a_vocabulary_without_the_characters() -> None:
    tokenizer = Tokenizer(models.BPE({"[UNK]": 0, "l": 1, "a": 2}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    assert check_trigger_word("la", tokenizer) == "la"
    with pytest.raises(TriggerWordError) as caught:
        check_trigger_word("lace", tokenizer)
    assert caught.value.metadata["why"] == "UNKNOWN_TOKEN"


def test_the_tokenizer_of_a_published_base(tokenizer_folder: Path, tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path))
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    files = {name: (tokenizer_folder / name).read_bytes() for name in names}
    publish(store, "bases/new/1", {f"tokenizer/{name}": data for name, data in files.items()})
    original = {f"tokenizer/{name}": files[name] for name in names[1:]}
    publish(store, "bases/original/1", original)

    new, old = read_tokenizer(store, "bases/new/1"), read_tokenizer(store, "bases/original/1")

    for text in ("<lace> white floral dress", "Étoile 42, don't!", "日本"):
        ids = new.encode(text, add_special_tokens=False).ids
        assert old.encode(text, add_special_tokens=False).ids == ids, "both ways agree"
    assert check_trigger_word("<lace>", old) == "<lace>"


def test_a_base_without_a_usable_tokenizer(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path))
    publish(store, "bases/none/1", {"toile.json": b"{}"})
    with pytest.raises(NotFoundError):
        read_tokenizer(store, "bases/none/1")
    broken = {"tokenizer/vocab.json": b"{broken", "tokenizer/merges.txt": b"#version\n"}
    publish(store, "bases/broken/1", broken)
    with pytest.raises(DataLossError):
        read_tokenizer(store, "bases/broken/1")
    publish(store, "bases/odd/1", {"tokenizer/tokenizer.json": json.dumps({}).encode()})
    with pytest.raises(DataLossError):
        read_tokenizer(store, "bases/odd/1")
