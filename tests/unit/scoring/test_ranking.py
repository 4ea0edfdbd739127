import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.core.errors import FailedPreconditionError
from toile.scoring import SCORERS, rank
from toile.scoring.ranking import NEUTRAL, normalise

SPREAD = SCORERS["prompt"].least_spread
values = st.one_of(st.none(), st.floats(-1, 1))


def test_the_best_gets_one_and_the_worst_nothing() -> None:
    assert normalise({"a": 0.1, "b": 0.5, "c": 0.3}, 0.05) == pytest.approx(
        {"a": 0.0, "b": 1.0, "c": 0.5}
    )


def test_equal_scores_say_nothing() -> None:
    assert normalise({"a": 0.3, "b": 0.3}, 0.05) == {"a": NEUTRAL, "b": NEUTRAL}
    assert normalise({"a": 0.3}, 0.05) == {"a": NEUTRAL}


def test_a_hairs_breadth_stays_one() -> None:
    normalised = normalise({"a": 0.300, "b": 0.301}, 0.05)
    assert 0.5 < normalised["b"] < 0.52
    assert normalised["a"] + normalised["b"] == pytest.approx(1.0)


def test_an_image_that_cannot_be_judged_is_average() -> None:
    normalised = normalise({"a": 0.1, "b": None, "c": 0.9}, 0.05)
    assert normalised["b"] == NEUTRAL
    assert normalise({"a": None, "b": None}, 0.05) == {"a": NEUTRAL, "b": NEUTRAL}


def test_weights_decide_between_scorers() -> None:
    scores = {
        "a": {"prompt": 0.9, "sharpness": 0.1},
        "b": {"prompt": 0.1, "sharpness": 0.9},
    }
    assert rank(scores, {"prompt": 2.0, "sharpness": 1.0})[0].name == "a"
    assert rank(scores, {"prompt": 1.0, "sharpness": 2.0})[0].name == "b"
    only = rank(scores, {"prompt": 0.0, "sharpness": 5.0})
    assert [(placed.name, placed.total) for placed in only] == [("b", 1.0), ("a", 0.0)]


def test_ties_are_broken_by_name_whatever_the_order() -> None:
    names = ("c", "a", "b")
    for order in itertools.permutations(names):
        placed = rank({name: {"prompt": 0.4} for name in order}, {"prompt": 1.0})
        assert [(p.name, p.rank, p.total) for p in placed] == [
            ("a", 1, 0.5),
            ("b", 2, 0.5),
            ("c", 3, 0.5),
        ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        rank({"a": {"prompt": 0.1}, "b": {"prompt": value}}, {"prompt": 1.0})
    assert caught.value.reason == "SCORE_NOT_FINITE"
    assert caught.value.metadata == {"scorer": "prompt", "image": "b"}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4),
        st.fixed_dictionaries({"prompt": values, "colour": values}),
        min_size=1,
        max_size=12,
    ),
    st.floats(0.001, 100),
    st.floats(0, 100),
)
def test_totals_are_shares_and_places_count_from_one(
    scores: dict[str, dict[str, float | None]], first: float, second: float
) -> None:
    placed = rank(scores, {"prompt": first, "colour": second})
    assert [one.rank for one in placed] == list(range(1, len(scores) + 1))
    assert {one.name for one in placed} == set(scores)
    totals = [one.total for one in placed]
    assert totals == sorted(totals, reverse=True)
    assert all(0 <= total <= 1 for total in totals)
    reversed_order = dict(reversed(list(scores.items())))
    assert rank(reversed_order, {"prompt": first, "colour": second}) == placed
