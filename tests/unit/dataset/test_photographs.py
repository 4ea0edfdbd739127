import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.dataset.photographs import clean_name


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("lace 01.jpg", "lace 01.jpg"),
        ("sub/folder/é.png", "sub/folder/é.png"),
        ("tab\there\r\n", "tabhere"),
        ("\x1b[2Jcleared", "[2Jcleared"),
        ("right\u202eto left", "rightto left"),
        ("\x00", "unnamed"),
        ("", "unnamed"),
        ("a" * 300 + ".jpg", "a" * 251 + ".jpg"),
    ],
)
def test_names_are_fit_to_be_shown(sent: str, kept: str) -> None:
    assert clean_name(sent) == kept


@given(st.text())
def test_any_name_becomes_one_printable_line(sent: str) -> None:
    kept = clean_name(sent)
    assert 0 < len(kept) <= 255
    assert clean_name(kept) == kept
    assert "\n" not in kept
