"""A calibration plans more λ and more samples where the curve bends, within its budget."""

import math
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from server.sweep.calibration_plan import MeasuredLambda, Rules, next_round

GRID = tuple(value / 10 for value in range(11))


def rules(budget: int = 20_000, target: float = 0.05) -> Rules:
    return Rules(GRID, samples=4, budget=budget, target_interval=target)


def step_at(middle: float, value: float, steepness: float = 30) -> float:
    return 1 / (1 + math.exp(-steepness * (value - middle)))


def rounds_of(middle: float, questions: int, how: Rules) -> list[dict[float, int]]:
    """Returns all rounds of a calibration whose think rate steps up at `middle`, the last empty."""
    planned: dict[float, int] = {}
    rounds = []
    while True:
        measured = []
        for value, samples in sorted(planned.items()):
            rate = step_at(middle, value)
            width = 4 * math.sqrt(rate * (1 - rate) / samples / questions)
            measured.append(MeasuredLambda(value, samples, 0.5 + rate / 2, rate, width))
        plan = next_round(measured, questions, how)
        rounds.append(plan)
        if not plan:
            return rounds
        planned |= plan


def total(rounds: list[dict[float, int]]) -> dict[float, int]:
    planned: dict[float, int] = {}
    for plan in rounds:
        planned |= plan
    return planned


def test_the_first_round_is_the_grid() -> None:
    assert next_round([], 150, rules()) == dict.fromkeys(GRID, 4)


def test_a_flat_curve_gets_no_second_round() -> None:
    flat = [MeasuredLambda(value, 4, 0.7, 1.0, 0.04) for value in GRID]
    assert next_round(flat, 150, rules()) == {}


def test_a_bend_is_split_in_the_middle_and_a_wide_interval_gets_more_samples() -> None:
    curve = [
        MeasuredLambda(0.0, 4, 0.4, 0.0, 0.01),
        MeasuredLambda(0.4, 4, 0.4, 0.0, 0.08),
        MeasuredLambda(0.5, 4, 0.4, 0.4, 0.2),
    ]
    assert next_round(curve, 10, rules()) == {0.45: 4, 0.4: 8, 0.5: 8}


def test_an_interval_gets_the_samples_that_it_needs_and_no_more() -> None:
    plan = next_round([MeasuredLambda(0.5, 100, 0.5, 0.5, 0.055)], 1, rules())
    assert plan == {0.5: 121}


def test_samples_go_where_the_curve_bends() -> None:
    planned = total(rounds_of(0.47, 150, rules()))
    inside = [value for value in planned if 0.35 <= value <= 0.6]
    assert len(inside) > len(planned) / 2
    assert min(planned[value] for value in (0.45, 0.47, 0.5)) > planned[0.0] == planned[1.0]


@settings(max_examples=60)
@given(
    st.floats(0, 1), st.integers(1, 200), st.integers(0, 30_000), st.sampled_from([0.01, 0.05, 0.5])
)
def test_a_plan_stays_within_its_budget_and_its_smallest_step(
    middle: float, questions: int, more: int, target: float
) -> None:
    budget = len(GRID) * 4 * questions + more
    rounds = rounds_of(middle, questions, rules(budget, target))
    planned = total(rounds)
    assert questions * sum(planned.values()) <= budget
    assert set(GRID) <= set(planned)
    assert all(high - low >= 0.02 - 1e-9 for low, high in pairwise(sorted(planned)))
    assert all(0 <= value <= 1 for value in planned)
    for before, after in pairwise(rounds):  # a λ that is planned again gets more samples
        assert all(after[value] > before[value] for value in set(before) & set(after))


def test_the_same_samples_give_the_same_plan() -> None:
    random = Random(0)
    curve = [MeasuredLambda(v, 4, random.random(), random.random(), random.random()) for v in GRID]
    assert next_round(curve, 20, rules()) == next_round(list(curve), 20, rules())
