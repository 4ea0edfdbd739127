import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.imaging.colour_difference import delta_e_2000
from toile.imaging.colour_words import find_colours, garment_colour, shade_of
from toile.imaging.colours import NAMED_COLOURS


@pytest.mark.parametrize(
    ("words", "shade"),
    [
        ("blue", "blue"),
        ("navy blue", "navy"),
        ("Navy", "navy"),
        ("dark red", "dark red"),
        ("burgundy", "dark red"),
        ("gray", "grey"),
        ("light grey", "light grey"),
        ("light gray", "light grey"),
        ("sky blue", "light blue"),
        ("forest green", "dark green"),
        ("bright yellow", "yellow"),
        ("off-white", "white"),
    ],
)
def test_spellings_lead_to_named_colours(words: str, shade: str) -> None:
    found = shade_of(words)
    assert found is not None
    assert str(found) == shade
    assert found.name in NAMED_COLOURS


@pytest.mark.parametrize("words", ["", "infrared", "bleu", "reddish", "blue dress", "red and blue"])
def test_what_is_not_one_colour_is_none(words: str) -> None:
    assert shade_of(words) is None


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ("a red dress", "red"),
        ("a dress on a grey background", None),
        ("a picture of a navy blue shirt on a plain white background", "navy"),
        ("white background, red hat", "red"),
        ("pants against a beige backdrop", None),
        ("a red shirt with white dots", "red"),
        ("", None),
    ],
)
def test_the_garments_colour_is_not_the_backgrounds(prompt: str, colour: str | None) -> None:
    found = garment_colour(prompt)
    assert (str(found) if found else None) == colour


@given(st.text(max_size=80))
def test_mentions_lie_in_the_text_in_order(text: str) -> None:
    end = 0
    for mention in find_colours(text):
        assert end <= mention.start < mention.end
        end = mention.end


# Sharma, Wu, Dalal 2005, table 1.
@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 3.1571, -77.2803), (50, 0, -82.7485), 2.8615),
        ((50, 2.8361, -74.0200), (50, 0, -82.7485), 3.4412),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, -0.001, 2.49), (50, 0.0009, -2.49), 4.8045),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.5, 0), (61, -5, 29), 22.8977),
        ((50, 2.5, 0), (56, -27, -3), 31.9030),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_agrees_with_the_published_pairs(
    first: tuple[float, ...], second: tuple[float, ...], difference: float
) -> None:
    assert float(delta_e_2000(first, second)) == pytest.approx(difference, abs=1e-4)
    assert float(delta_e_2000(second, first)) == pytest.approx(difference, abs=1e-4)
