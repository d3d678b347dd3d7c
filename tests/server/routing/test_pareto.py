from hypothesis import given
from hypothesis import strategies as st

from server.routing.pareto import pareto_front


def front_of(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return pareto_front(points, tokens=lambda it: it[0], score=lambda it: it[1])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    best = {it for it in points if not any(beats(other, it) for other in points)}
    front = front_of(points)
    assert set(front) == best
    assert front == sorted(best)
    assert front_of(front) == front


def test_of_equal_points_the_first_stays() -> None:
    points = [("b", 2, 5), ("a", 2, 5), ("c", 3, 5)]
    front = pareto_front(points, tokens=lambda it: it[1], score=lambda it: it[2])
    assert front == [("b", 2, 5)]


def test_the_papers_own_front_comes_out() -> None:
    """λ, score and tokens of Qwen3-4B on AIME'25, from tables 2 and 5 of arXiv 2510.10977."""
    curve = [
        (0.0, 46.6, 15097),
        (0.2, 52.2, 16794),
        (0.4, 55.8, 12448),
        (0.45, 58.5, 11290),
        (0.5, 62.5, 11189),
        (0.55, 67.6, 11634),
        (0.6, 71.0, 12681),
        (0.8, 80.5, 17574),
        (1.0, 80.4, 22813),
    ]
    front = pareto_front(curve, tokens=lambda it: it[2], score=lambda it: it[1])
    assert [value for value, _, _ in front] == [0.5, 0.55, 0.6, 0.8]
