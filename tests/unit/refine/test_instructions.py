import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.core.errors import InvalidArgumentError
from toile.imaging.colours import NAMED_COLOURS
from toile.refine.instructions import EXAMPLES, Edit, parse_instruction


def read(text: str) -> tuple[str, str, str]:
    edit = parse_instruction(text)
    return edit.operation.value, edit.region, edit.value


@pytest.mark.parametrize(
    ("text", "operation", "region", "value"),
    [
        ("make it blue", "colour", "garment", "blue"),
        ("Make it BLUE, please!", "colour", "garment", "blue"),
        ("change the colour to dark red", "colour", "garment", "dark red"),
        ("change the color of the sleeves to navy blue", "colour", "sleeves", "navy"),
        ("make the sleeves red", "colour", "sleeves", "red"),
        ("paint the arms sky blue", "colour", "sleeves", "light blue"),
        ("could you make the top teal?", "colour", "body", "teal"),
        ("turn the background gray", "colour", "background", "grey"),
        ("turn the backdrop grey", "colour", "background", "grey"),
        ("make the white background black", "colour", "background", "black"),
        ("make the red dress blue", "colour", "garment", "blue"),
        ("change red to blue", "colour", "garment", "blue"),
        ("change the sleeves from red to blue", "colour", "sleeves", "blue"),
        ("make the dress's sleeves red", "colour", "sleeves", "red"),
        ("make the sleeves of the dress red", "colour", "sleeves", "red"),
        ("make the waistband of the skirt red", "colour", "waistband", "red"),
        ("change the fabric to blue", "colour", "garment", "blue"),
        ("burgundy sleeves", "colour", "sleeves", "dark red"),
        ("blue", "colour", "garment", "blue"),
        ("make it lace", "material", "garment", "lace"),
        ("change the fabric to denim", "material", "garment", "denim"),
        ("replace the fabric with lace", "material", "garment", "lace"),
        ("make it look like silk", "material", "garment", "satin"),
        ("make it blue denim", "material", "garment", "blue denim"),
        ("make it striped", "pattern", "garment", "striped"),
        ("add white dots", "pattern", "garment", "white dotted"),
        ("add polka dots to the sleeves", "pattern", "sleeves", "dotted"),
        ("add blue stripes on the white dress", "pattern", "garment", "blue striped"),
        ("give it a floral print", "pattern", "garment", "floral"),
        ("change the pattern to checked", "pattern", "garment", "checked"),
        ("replace the stripes with dots", "pattern", "garment", "dotted"),
        ("remove the stripes", "pattern", "garment", "plain"),
        ("remove the pattern", "pattern", "garment", "plain"),
        ("make it plain white", "pattern", "garment", "white plain"),
    ],
)
def test_what_people_say_is_understood(text: str, operation: str, region: str, value: str) -> None:
    assert read(text) == (operation, region, value)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_that_errors_give_are_understood(example: str) -> None:
    assert isinstance(parse_instruction(example), Edit)


@pytest.mark.parametrize("colour", sorted(NAMED_COLOURS))
def test_every_named_colour_can_be_asked_for(colour: str) -> None:
    assert read(f"make it {colour}") == ("colour", "garment", colour)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "make it",
        "do a backflip",
        "make it darker",
        "don't make it blue",
        "make it not blue",
        "remove the sleeves",
        "put a belt on it",
        "🔵",
        "DROP TABLE images",
    ],
)
def test_what_makes_no_sense_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_instruction(text)
    assert caught.value.reason == "INSTRUCTION_NOT_UNDERSTOOD"
    assert caught.value.metadata["field"] == "instruction"
    assert "make it blue" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "make it red and blue",
        "make it blue and striped",
        "make it red striped",
        "make it red with white dots",
        "make the sleeves and the collar red",
        "make it striped denim",
        "change the colour to striped",
        "change the pattern to blue",
    ],
)
def test_what_can_be_read_in_several_ways_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_instruction(text)
    assert caught.value.reason == "INSTRUCTION_AMBIGUOUS"


def test_a_slip_of_the_pen_gets_a_hint() -> None:
    with pytest.raises(InvalidArgumentError, match='perhaps "blue"'):
        parse_instruction("make it bleu")


def understood_or_refused(text: str) -> bool:
    try:
        return bool(parse_instruction(text).value)
    except InvalidArgumentError as error:
        return error.reason.startswith("INSTRUCTION_")


@given(st.text(max_size=60))
def test_any_text_is_understood_or_refused(text: str) -> None:
    assert understood_or_refused(text)


WORDS = """
make the it of to with and red dark blue sleeves dress dots striped lace background colour
remove add plain from on replace
"""


@given(st.lists(st.sampled_from(WORDS.split()), max_size=10))
def test_any_words_are_understood_or_refused(words: list[str]) -> None:
    assert understood_or_refused(" ".join(words))
