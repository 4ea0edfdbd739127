"""How the benchmark of drawing writes a figure beside its bound."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from serve import render

    return render


@pytest.mark.parametrize(
    ("value", "bound", "most", "written"),
    [
        (4.04, 4.0, False, "4.0"),
        (4.0, 4.0, False, "4.0"),
        (3.2, 4.0, False, "**3.2, missed**"),
        (3.996, 4.0, False, "**3.996, missed**"),
        (9.96, 10.0, True, "10.0"),
        (10.0, 10.0, True, "10.0"),
        (10.004, 10.0, True, "**10.004, missed**"),
    ],
)
def test_a_bound_that_is_missed_is_seen_to_be(render, value, bound, most, written) -> None:
    assert render._number(value, bound, 1, most=most) == written
