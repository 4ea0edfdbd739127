"""How prompts are read; the examples with weights are those of the web UI's own doctest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.core.errors import InvalidArgumentError
from toile.core.prompts import MAX_CHUNKS, check_prompt, count_chunks, escape, parse_prompt


def spans(prompt: str) -> list[tuple[str, float]]:
    (section,) = parse_prompt(prompt)
    return [(span.text, round(span.weight, 4)) for span in section]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("[[faint]]", [("faint", 0.8264)]),
        ("a dress :)", [("a dress :)", 1.0)]),
        ("red] dress: long", [("red] dress: long", 1.0)]),
        ("at 12:30) sharp", [("at 12:30) sharp", 1.0)]),
        ("(colour: red)", [("colour: red", 1.1)]),
        ("(lace: 0.7 ) hem", [("lace", 0.7), (" hem", 1.0)]),
        (r"one \\ two", [("one \\ two", 1.0)]),
    ],
)
def test_emphasis_is_read_as_the_web_ui_reads_it(
    prompt: str, expected: list[tuple[str, float]]
) -> None:
    assert spans(prompt) == [(text, weight) for text, weight in expected if text.strip()]


@pytest.mark.parametrize("prompt", ["(a:1.2.3)", "(a:.)", "(a:-1)", "(a:11)", "(" * 30 + "a"])
def test_weights_that_mean_nothing_are_refused(prompt: str) -> None:
    with pytest.raises(InvalidArgumentError, match="negative_prompt") as caught:
        parse_prompt(prompt, "negative_prompt")
    assert caught.value.reason == "BAD_EMPHASIS"
    assert caught.value.metadata["field"] == "negative_prompt"


def test_break_begins_a_section_and_keeps_the_weight() -> None:
    first, second, third = parse_prompt("a dress BREAK (lace BREAK satin:1.5) BREAK BREAK")
    assert [(s.text.strip(), s.weight) for s in first] == [("a dress", 1.0)]
    assert [(s.text.strip(), s.weight) for s in second] == [("lace", 1.5)]
    assert [(s.text.strip(), s.weight) for s in third] == [("satin", 1.5)]
    assert len(parse_prompt("a BREAKING break")) == 1
    assert parse_prompt(" BREAK ") == [[]]


def test_chunks_are_counted_and_limited() -> None:
    def tokens(text: str) -> int:
        return len(text.split())

    assert count_chunks("", tokens) == 1
    assert count_chunks("red " * 75, tokens) == 1
    assert count_chunks("red " * 76, tokens) == 2
    assert count_chunks("(red) BREAK blue", tokens) == 2
    assert count_chunks("(" + "red " * 50 + ":1.2) " + "blue " * 26, tokens) == 2
    assert check_prompt("red " * 75 * MAX_CHUNKS, tokens) == MAX_CHUNKS
    with pytest.raises(InvalidArgumentError) as caught:
        check_prompt("red " * 75 * MAX_CHUNKS + "red", tokens, "negative_prompt")
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.metadata["field"] == "negative_prompt"


@given(st.text(alphabet="ab :1.5()[]\\ \n", max_size=60))
def test_escaped_text_is_itself(text: str) -> None:
    expected = [(text, 1.0)] if text.strip() else []
    assert spans(escape(text)) == expected
    assert escape("BREAK it") == "break it"


@given(st.text(alphabet="ab :159.()[]\\ \nBREAK", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        sections = parse_prompt(text)
    except InvalidArgumentError:
        return
    assert sections
    words = "".join(span.text for section in sections for span in section)
    assert set("".join(words.split())) <= set(text)
