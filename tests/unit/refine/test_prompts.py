import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.refine.instructions import EXAMPLES, parse_instruction
from toile.refine.prompts import edit_prompt, names_material


@pytest.mark.parametrize(
    ("prompt", "instruction", "edited"),
    [
        ("a red dress", "make it blue", "a blue dress"),
        ("a red dress", "make it orange", "an orange dress"),
        ("an orange dress", "make it red", "a red dress"),
        ("a dress", "make it blue", "a blue dress"),
        ("", "make it blue", "a blue garment"),
        ("photo of a woman", "make it blue", "photo of a woman, blue garment"),
        (
            "red striped denim skirt on a white background",
            "make it navy blue",
            "navy striped denim skirt on a white background",
        ),
        ("dress on a white background", "make it blue", "blue dress on a white background"),
        (
            "<lace> white floral lace dress",
            "make it blue",
            "<lace> blue floral lace dress",
        ),
        ("<red> dress", "make it blue", "<red> blue dress"),
        ("an orange shirt with white dots", "make it blue", "a blue shirt with white dots"),
        ("a dress, red sleeves", "make it blue", "a blue dress, red sleeves"),
        ("a dress, red sleeves", "make the sleeves blue", "a dress, blue sleeves"),
        (
            "a red dress on a white background",
            "make the sleeves blue",
            "a red dress with blue sleeves on a white background",
        ),
        (
            "a red dress on a white background",
            "turn the background grey",
            "a red dress on a grey background",
        ),
        ("a red dress", "turn the background grey", "a red dress on a grey background"),
        ("a red dress", "make it lace", "a red lace dress"),
        ("a red denim skirt", "make it lace", "a red lace skirt"),
        ("a red denim skirt", "make it blue lace", "a blue lace skirt"),
        ("a red lace dress", "make it striped", "a red striped lace dress"),
        ("a red floral dress", "make it striped", "a red striped dress"),
        ("a red dress", "add white dots", "a red dotted dress with white dots"),
        ("a red dress with white dots", "make it striped", "a red striped dress"),
        ("a red striped dress", "remove the stripes", "a red plain dress"),
        (
            "a red dress on a striped background",
            "make it dotted",
            "a red dotted dress on a striped background",
        ),
    ],
)
def test_the_edit_is_written_where_it_belongs(prompt: str, instruction: str, edited: str) -> None:
    assert edit_prompt(prompt, parse_instruction(instruction)) == edited


@given(st.text(max_size=60), st.sampled_from(EXAMPLES))
def test_any_prompt_takes_any_edit(prompt: str, example: str) -> None:
    edit = parse_instruction(example)
    edited = edit_prompt(prompt, edit)
    assert any(word in edited for word in (edit.value, edit.word) if word)


def test_the_material_is_read_from_the_prompt() -> None:
    assert names_material("white floral lace dress", "lace")
    assert names_material("a lacy dress", "lace")
    assert not names_material("<lace> a white dress", "lace")
    assert not names_material("a denim dress", "lace")
