"""The three stages of a curve are found by its think rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.sweep.stages import Stages, stages
from tests.server.paper_curve import AIME_CURVE

SHARES = st.floats(0, 1)


def curve_of(*values: float) -> list[tuple[float, float]]:
    return [(at / 10, value) for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        (curve_of(0, 0.05, 0.5, 0.95, 1), Stages(0.1, 0.3)),
        (curve_of(0, 1), Stages(0.0, 0.1)),
        (curve_of(0, 0.3, 0.05, 0.6, 0.95, 0.8, 1), Stages(0.0, 0.6)),
        (curve_of(0, 0.02, 0.05), None),
        (curve_of(1, 0.99, 1), None),
        (curve_of(0, 0.5, 0.89), None),
        (curve_of(0.1, 0.5, 0.9), None),
        (curve_of(1, 0), None),
        (curve_of(0.5), None),
        ([], None),
    ],
)
def test_the_stages_of_a_curve_follow_the_rule_of_the_report(
    curve: list[tuple[float, float]], found: Stages | None
) -> None:
    assert stages(curve) == found


@given(st.lists(SHARES, max_size=12))
def test_the_think_rate_is_low_up_to_the_first_stage_and_high_from_the_last(
    values: list[float],
) -> None:
    curve = curve_of(*values)
    found = stages(curve)
    if found is None:
        assert not values or values[0] >= 0.1 or values[-1] < 0.9
        return
    assert found.instruct_until < found.thinking_from
    assert all(rate < 0.1 for at, rate in curve if at <= found.instruct_until)
    assert all(rate >= 0.9 for at, rate in curve if at >= found.thinking_from)


def test_the_stages_of_the_papers_curve_are_the_papers() -> None:
    curve = [(point.reasoning_lambda, point.think_rate / 100) for point in AIME_CURVE]
    assert stages(curve) == Stages(0.4, 0.55)
