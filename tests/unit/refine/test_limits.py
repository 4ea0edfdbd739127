from hypothesis import given
from hypothesis import strategies as st

from toile.refine.limits import steps_for


@given(st.floats(1e-3, 1.0), st.integers(1, 150))
def test_at_least_one_step_is_drawn(strength: float, wanted: int) -> None:
    steps = steps_for(strength, wanted)
    assert steps >= wanted
    assert int(steps * strength) >= 1


def test_a_share_that_rounds_down_gets_one_step_more() -> None:
    assert steps_for(1 / 49, 1) == 50
    assert steps_for(0.5, 20) == 20
