"""The Pareto front keeps the points that no other point beats in both score and tokens."""

from hypothesis import given
from hypothesis import strategies as st

from server.routing.pareto import pareto_front
from tests.server.paper_curve import AIME_CURVE


def front_of(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return pareto_front(points, tokens=lambda it: it[0], score=lambda it: it[1])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_has_exactly_the_points_that_no_other_point_beats(
    points: list[tuple[int, int]],
) -> None:
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    best = {it for it in points if not any(beats(other, it) for other in points)}
    front = front_of(points)
    assert set(front) == best
    assert front == sorted(best)
    assert front_of(front) == front


def test_the_first_of_equal_points_stays() -> None:
    points = [("b", 2, 5), ("a", 2, 5), ("c", 3, 5)]
    front = pareto_front(points, tokens=lambda it: it[1], score=lambda it: it[2])
    assert front == [("b", 2, 5)]


def test_the_front_of_the_papers_curve_is_the_papers() -> None:
    front = pareto_front(AIME_CURVE, tokens=lambda it: it.tokens, score=lambda it: it.score)
    assert [point.reasoning_lambda for point in front] == [0.5, 0.55, 0.6, 0.8]
