"""The three stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.sweep.stages import Stages, stages

shares = st.floats(0, 1)


def rates(*values: float) -> list[tuple[float, float]]:
    return [(at / 10, value) for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        (rates(0, 0.05, 0.5, 0.95, 1), Stages(0.1, 0.3)),
        (rates(0, 1), Stages(0.0, 0.1)),
        (rates(0, 0.3, 0.05, 0.6, 0.95, 0.8, 1), Stages(0.0, 0.6)),
        (rates(0, 0.02, 0.05), None),
        (rates(1, 0.99, 1), None),
        (rates(0, 0.5, 0.89), None),
        (rates(0.1, 0.5, 0.9), None),
        (rates(1, 0), None),
        (rates(0.5), None),
        ([], None),
    ],
)
def test_stages_follow_the_rule(curve: list[tuple[float, float]], found: Stages | None) -> None:
    assert stages(curve) == found


@given(st.lists(shares, max_size=12))
def test_below_the_first_stage_nothing_thinks_and_above_the_last_all_do(
    values: list[float],
) -> None:
    curve = rates(*values)
    found = stages(curve)
    if found is None:
        assert not values or values[0] >= 0.1 or values[-1] < 0.9
        return
    assert found.instruct_until < found.thinking_from
    assert all(rate < 0.1 for at, rate in curve if at <= found.instruct_until)
    assert all(rate >= 0.9 for at, rate in curve if at >= found.thinking_from)


def test_the_papers_own_stages_come_out() -> None:
    """Qwen3-4B on AIME'25, from tables 2 and 5 of arXiv 2510.10977."""
    curve = [
        (0.0, 46.6, 15097, 0.0),
        (0.2, 52.2, 16794, 0.0),
        (0.4, 55.8, 12448, 1.4),
        (0.45, 58.5, 11290, 14.4),
        (0.5, 62.5, 11189, 59.6),
        (0.55, 67.6, 11634, 91.6),
        (0.6, 71.0, 12681, 100.0),
        (0.8, 80.5, 17574, 99.9),
        (1.0, 80.4, 22813, 99.9),
    ]
    assert stages([(at, think / 100) for at, _, _, think in curve]) == Stages(0.4, 0.55)
