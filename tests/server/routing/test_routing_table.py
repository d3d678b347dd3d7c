"""The routing table chooses the best λ for a budget or an effort, whatever curve it gets."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import Dial
from server.routing.profiles import MeasuredLengths as Measured
from server.routing.profiles import Point, RoutingClass
from server.routing.routing_table import P90_PER_MEAN, ExpectedLengths, RoutingTable

STEP = 0.01


def point(value: float, score: float, mean: float, p90: float | None = None) -> Point:
    return Point(
        reasoning_lambda=value,
        score=score,
        reasoning_tokens=Measured(mean=mean, p90=p90),
        think_rate=1.0,
    )


def table(*points: Point, step: float = STEP) -> RoutingTable:
    return RoutingTable(RoutingClass(points=points), step=step)


@st.composite
def curves(draw: st.DrawFn) -> tuple[Point, ...]:
    lambdas = draw(st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True))
    score, tokens = st.integers(0, 1000), st.integers(0, 5000)
    return tuple(
        point(
            value / 100,
            draw(score) / 1000,
            float(draw(tokens)),
            draw(st.none() | tokens.map(float)),
        )
        for value in sorted(lambdas)
    )


TABLES = curves().map(lambda points: table(*points))
BUDGETS = st.integers(0, 10_000)
SHARES = st.floats(0, 1)


# --- candidates ---


@given(curves())
def test_the_front_has_exactly_the_points_that_no_point_dominates(
    points: tuple[Point, ...],
) -> None:
    def dominates(one: Point, other: Point) -> bool:
        ours = (one.reasoning_tokens.mean, -one.score)
        theirs = (other.reasoning_tokens.mean, -other.score)
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))

    front = {candidate.reasoning_lambda for candidate in table(*points).front}
    for one in points:
        dominated = any(dominates(other, one) for other in points)
        equals = [
            it
            for it in points
            if (it.score, it.reasoning_tokens.mean) == (one.score, one.reasoning_tokens.mean)
        ]
        assert (one.reasoning_lambda in front) == (not dominated and one is equals[0])


@given(TABLES)
def test_candidates_rise_in_score_and_in_tokens(routes: RoutingTable) -> None:
    for one, after in pairwise(routes.candidates):
        assert after.score >= one.score
        assert after.mean >= one.mean


@given(curves())
def test_a_lambda_between_points_is_a_candidate_only_where_its_neighbours_are_on_the_front(
    points: tuple[Point, ...],
) -> None:
    routes = table(*points)
    front = {candidate.reasoning_lambda for candidate in routes.front}
    measured = [it.reasoning_lambda for it in points]
    for candidate in routes.candidates:
        if candidate.reasoning_lambda in measured:
            assert candidate.reasoning_lambda in front
            continue
        below = max(value for value in measured if value < candidate.reasoning_lambda)
        above = min(value for value in measured if value > candidate.reasoning_lambda)
        assert {below, above} <= front


def test_between_neighbours_on_the_front_values_are_interpolated() -> None:
    routes = table(point(0.5, 0.4, 100, 200), point(0.6, 0.8, 300, 400))
    candidate = routes.by_budget(250)
    assert candidate.reasoning_lambda == 0.52
    assert candidate.score == pytest.approx(0.48)
    assert (candidate.mean, candidate.p90) == (pytest.approx(140), pytest.approx(240))


def test_across_a_dominated_point_nothing_is_interpolated() -> None:
    routes = table(point(0.4, 0.4, 100, 200), point(0.5, 0.1, 900), point(0.6, 0.8, 300, 400))
    assert [candidate.reasoning_lambda for candidate in routes.candidates] == [0.4, 0.6]
    assert routes.by_budget(399).reasoning_lambda == 0.4


def test_across_another_point_of_the_front_nothing_is_interpolated() -> None:
    """A line from λ = 0.4 to 0.5 would promise more than 0.9, which was measured."""
    others = (point(0.7, 0.0, 999), point(0.9, 0.2, 500))
    routes = table(point(0.4, 0.1, 100), point(0.5, 0.9, 900), *others)
    assert [candidate.reasoning_lambda for candidate in routes.candidates] == [0.4, 0.9, 0.5]


@given(curves(), st.sampled_from([1.0, 0.5, 0.1, 0.05, 0.01, 0.001]))
def test_every_candidate_is_a_lambda_that_the_server_can_run(
    points: tuple[Point, ...], step: float
) -> None:
    on_grid = [
        it
        for it in points
        if Dial.on_grid(it.reasoning_lambda, step).reasoning_lambda == it.reasoning_lambda
    ]
    for candidate in table(*points, step=step).candidates if on_grid else ():
        assert (
            Dial.on_grid(candidate.reasoning_lambda, step).reasoning_lambda
            == candidate.reasoning_lambda
        )


def test_points_are_candidates_even_if_none_lies_on_the_grid() -> None:
    assert table(point(0.4, 0.5, 10), step=1.0).cheapest.reasoning_lambda == 0.4


def test_a_fine_grid_makes_no_more_candidates_than_a_hundred_cells() -> None:
    routes = table(point(0.0, 0.1, 1), point(1.0, 0.9, 100), step=0.0001)
    assert len(routes.candidates) == 101


# --- budgets ---


@given(TABLES, BUDGETS)
def test_a_budget_takes_the_best_candidate_whose_p90_fits(
    routes: RoutingTable, budget: int
) -> None:
    fitting = [candidate.score for candidate in routes.candidates if candidate.p90 <= budget]
    candidate = routes.by_budget(budget)
    if fitting:
        assert candidate.p90 <= budget
        assert candidate.score == max(fitting)
    else:
        assert candidate == routes.cheapest


@given(TABLES, BUDGETS, BUDGETS)
def test_a_larger_budget_never_expects_a_lower_score(
    routes: RoutingTable, one: int, other: int
) -> None:
    small, large = sorted((one, other))
    assert routes.by_budget(large).score >= routes.by_budget(small).score


def test_without_quantiles_the_p90_is_estimated_from_the_mean() -> None:
    routes = table(point(0.0, 0.1, 50), point(0.5, 0.5, 100), point(1.0, 0.4, 100))
    assert [it.p90_source for it in routes.lengths] == ["estimated"] * 3
    assert routes.lengths[1].p90 == 100 * P90_PER_MEAN
    assert routes.by_budget(100 * P90_PER_MEAN).reasoning_lambda == 0.5
    assert routes.by_budget(100 * P90_PER_MEAN - 1).score < 0.5


# --- efforts ---


@given(TABLES, SHARES, SHARES)
def test_more_effort_never_expects_a_lower_score_nor_fewer_tokens(
    routes: RoutingTable, one: float, other: float
) -> None:
    less, more = (routes.by_effort(share) for share in sorted((one, other)))
    assert more.score >= less.score
    assert more.mean >= less.mean


@given(TABLES)
def test_efforts_go_from_the_cheapest_to_the_best(routes: RoutingTable) -> None:
    assert routes.by_effort(0) == routes.cheapest
    assert routes.by_effort(1).score == pytest.approx(routes.candidates[-1].score)


@given(TABLES, SHARES)
def test_an_effort_takes_the_cheapest_candidate_with_its_share_of_the_gain(
    routes: RoutingTable, share: float
) -> None:
    low, high = routes.candidates[0].score, routes.candidates[-1].score
    enough = [it for it in routes.candidates if it.score >= low + share * (high - low) - 1e-9]
    assert routes.by_effort(share) == enough[0]


# --- expectations ---


@given(TABLES)
def test_the_expected_tokens_at_a_candidate_are_its_mean(routes: RoutingTable) -> None:
    for candidate in routes.candidates:
        assert routes.mean_at(candidate.reasoning_lambda) == pytest.approx(candidate.mean)


def test_outside_the_measured_range_no_tokens_are_expected() -> None:
    routes = table(point(0.4, 0.4, 100), point(0.6, 0.3, 300))
    assert routes.mean_at(0.39) is None
    assert routes.mean_at(0.61) is None
    assert routes.mean_at(0.45) == pytest.approx(150)  # known, though never chosen


def test_observed_lengths_replace_measured_ones() -> None:
    """Here the point that was measured as the cheapest turned out to be the most expensive."""
    points = RoutingClass(points=(point(0.2, 0.4, 10, 20), point(0.6, 0.8, 300, 400)))
    seen = {0.2: ExpectedLengths(900.0, 1000.0, "observed")}
    routes = RoutingTable(points, step=STEP, observed=seen.get)
    assert [it.p90_source for it in routes.lengths] == ["observed", "measured"]
    assert [candidate.reasoning_lambda for candidate in routes.front] == [0.6]
    assert routes.by_effort(0).reasoning_lambda == 0.6
