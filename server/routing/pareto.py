"""Finds the Pareto front of points that cost tokens and have a score."""

from collections.abc import Callable, Iterable
from typing import TypeVar

_T = TypeVar("_T")


def pareto_front(
    points: Iterable[_T], *, tokens: Callable[[_T], float], score: Callable[[_T], float]
) -> list[_T]:
    """Returns the points that no other dominates, by rising tokens and score.

    A point dominates another that has no fewer tokens and no higher score. Of equal points the
    first is kept.
    """
    front: list[_T] = []
    for point in sorted(points, key=lambda it: (tokens(it), -score(it))):
        if not front or score(point) > score(front[-1]):
            front.append(point)
    return front
