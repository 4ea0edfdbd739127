import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toile.core.errors import InvalidArgumentError
from toile.generate.wildcards import check_template, check_wildcards, expand


def chosen(template: str, seed: int = 0, **lists: list[str]) -> str:
    check_template(template, lists)
    return expand(template, lists, seed, most_characters=2000)


def every(template: str, **lists: list[str]) -> set[str]:
    return {chosen(template, seed, **lists) for seed in range(200)}


def test_a_variant_is_taken_by_the_seed() -> None:
    assert every("a {red|blue} dress") == {"a red dress", "a blue dress"}
    assert chosen("a {red|blue|green} dress", 3) == chosen("a {red|blue|green} dress", 3)


def test_choices_are_the_same_for_ever() -> None:
    template = "{a|b|c|d|e|f|g|h}{a|b|c|d|e|f|g|h}"
    assert [chosen(template, seed) for seed in range(4)] == ["ec", "hd", "ee", "gg"]


def test_lists_and_variants_nest() -> None:
    assert every("{a {b|c}|__d__}!", d=["x", "{y|__e__}"], e=["z"]) == {
        "a b!",
        "a c!",
        "x!",
        "y!",
        "z!",
    }


def test_choices_are_independent() -> None:
    assert len(every("{a|b}{a|b}{a|b}")) == 8


def test_an_empty_variant_leaves_words_out() -> None:
    assert every("a {long |}dress") == {"a long dress", "a dress"}


@pytest.mark.parametrize(
    "literal",
    [
        "a (red:1.2) dress, [soft], ((lace))",
        "a {red} dress",
        "{never closed | a dress",
        "closed} too early",
        "red|blue",
        "snake_case __",
        "a __ b __",
        "",
        "{" * 60 + "a|b",
    ],
)
def test_what_is_left_alone(literal: str) -> None:
    assert chosen(literal) == literal


def test_a_backslash_makes_literal() -> None:
    assert chosen(r"\{red\|blue\}") == "{red|blue}"


def test_emphasis_inside_a_variant() -> None:
    assert every("{(red:1.2)|[blue]} dress") == {"(red:1.2) dress", "[blue] dress"}


def test_an_unknown_list_is_named_also_where_no_seed_leads() -> None:
    for template, lists in (
        ("__colour__ dress", {}),
        ("{a|__colour__}", {"color": ["red"]}),
        ("__a__", {"a": ["x", "__colour__"]}),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            check_template(template, lists)
        assert caught.value.reason == "UNKNOWN_WILDCARD"
        assert caught.value.metadata == {"wildcard": "colour", "field": "prompt"}


@pytest.mark.parametrize(
    ("template", "lists"),
    [
        ("__a__", {"a": ["__a__"]}),
        ("__a__", {"a": ["__b____b__"], "b": ["__a__"]}),
        ("__a__", {"a": ["__b__ " * 20], "b": ["__c__ " * 20], "c": ["__d__ " * 20], "d": ["x"]}),
        ("__a__", {"a": ["x" * 2001]}),
    ],
)
def test_what_unfolds_without_end_is_refused(template: str, lists: dict[str, list[str]]) -> None:
    check_template(template, lists)
    with pytest.raises(InvalidArgumentError) as caught:
        expand(template, lists, 0, most_characters=2000)
    assert caught.value.reason == "EXPANSION_TOO_LONG"


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ({"a b": ["x"]}, "BAD_WILDCARD"),
        ({"": ["x"]}, "BAD_WILDCARD"),
        ({"a__b": ["x"]}, "BAD_WILDCARD"),
        ({"a": []}, "BAD_WILDCARD"),
        ({"a": ["x"] * 1001}, "BAD_WILDCARD"),
        ({"a": ["x" * 2001]}, "WILDCARDS_TOO_LONG"),
        ({"a": ["x" * 2000] * 30, "b": ["x" * 2000] * 30}, "WILDCARDS_TOO_LONG"),
    ],
)
def test_lists_that_cannot_be(lists: dict[str, list[str]], reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_wildcards(lists)
    assert caught.value.reason == reason


@settings(max_examples=300, deadline=None)
@given(st.text("ab{}|\\_ ", max_size=40), st.integers(0, 2**63 - 1))
def test_any_text_is_a_prompt(template: str, seed: int) -> None:
    lists = {"a": ["x"], "b": ["y"], "ab": ["z"], "ba": ["{p|q}"]}
    try:
        check_template(template, lists)
    except InvalidArgumentError as error:
        assert error.reason == "UNKNOWN_WILDCARD"  # noqa: PT017
        return
    assert expand(template, lists, seed, most_characters=2000) == expand(
        template, lists, seed, most_characters=2000
    )
