"""From a measured curve to λ: which points are worth their tokens, and which of them a budget or an
effort takes. Plain Python, and nothing of a request.

λ is not monotone in tokens or score, so nothing here goes along λ but the *front*: points to which
no other has as high a score at as few reasoning tokens. Ordered by tokens, the front rises in
score. Where two of its neighbours are neighbours in λ as well, the λ values between them are
*stops* too, on the straight line between both; elsewhere only what was measured is one.

    score │          ┌──●  best               effort: the cheapest stop with that share of the
          │     ●───●                                 score between cheapest and best
          │  ●        ×  dominated            budget: the best stop whose p90 fits
          └──────────────── reasoning tokens

Everything is computed when the table is made; a decision is one bisection.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from server.routing.profiles import Point, RoutingClass

P90_PER_MEAN: Final = 1.8
"""Where only means were published: of a log-normal with σ = 0.6, exp(1.2816 σ - σ²/2)."""
MOST_CELLS: Final = 100  # λ values that interpolation considers
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Lengths:
    """Reasoning tokens at a λ."""

    mean: float
    p90: float
    p90_source: str  # measured, estimated or observed


@dataclass(frozen=True, slots=True)
class Stop:
    """A λ that may be chosen, and what is expected there."""

    reasoning_lambda: float
    score: float
    mean: float  # reasoning tokens
    p90: float


Observed = Callable[[float], Lengths | None]
"""What was observed at a λ, where that is enough to go by."""


def nothing_observed(_: float) -> None:
    return None


class RoutingTable:
    """The decisions of one routing class, for a server whose grid is `step`."""

    def __init__(
        self, measured: RoutingClass, *, step: float, observed: Observed = nothing_observed
    ) -> None:
        self.lengths = tuple(
            observed(point.reasoning_lambda) or published_lengths(point)
            for point in measured.points
        )
        self._curve = tuple(map(_stop, measured.points, self.lengths))
        self.front = pareto_front(_on_grid(self._curve, step))
        self.stops = tuple(_stops(self.front, self._curve, step))
        self._scores = [stop.score for stop in self.stops]
        by_p90 = sorted(self.stops, key=lambda stop: stop.p90)
        self._p90s = [stop.p90 for stop in by_p90]
        self._best = list(accumulate(by_p90, _better))

    @property
    def cheapest(self) -> Stop:
        return self.stops[0]

    def by_budget(self, tokens: float) -> Stop:
        """The best stop whose p90 is within `tokens`; the cheapest where none is."""
        fitting = bisect_right(self._p90s, tokens)
        return self._best[fitting - 1] if fitting else self.cheapest

    def by_effort(self, share: float) -> Stop:
        """The cheapest stop that has `share` (0 to 1) of what the front gains in score."""
        low, high = self._scores[0], self._scores[-1]
        target = low + share * (high - low) - _ROUNDING
        return self.stops[min(bisect_left(self._scores, target), len(self.stops) - 1)]

    def mean_at(self, value: float) -> float | None:
        """Reasoning tokens expected at λ, on the line between measured neighbours; None outside."""
        at = bisect_left(self._curve, value, key=lambda stop: stop.reasoning_lambda)
        if at < len(self._curve) and self._curve[at].reasoning_lambda == value:
            return self._curve[at].mean
        if not 0 < at < len(self._curve):
            return None
        return _between(self._curve[at - 1], self._curve[at], value).mean


def published_lengths(point: Point) -> Lengths:
    """A profile's own numbers; a p90 that it lacks is estimated from the mean."""
    tokens = point.reasoning_tokens
    if tokens.p90 is not None:
        return Lengths(tokens.mean, tokens.p90, "measured")
    return Lengths(tokens.mean, tokens.mean * P90_PER_MEAN, "estimated")


def pareto_front(points: Iterable[Stop]) -> tuple[Stop, ...]:
    """The points that no other dominates, by rising tokens and score; of equals the lowest λ."""
    front: list[Stop] = []
    for point in sorted(points, key=lambda it: (it.mean, -it.score, it.reasoning_lambda)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return tuple(front)


def _stop(point: Point, lengths: Lengths) -> Stop:
    return Stop(point.reasoning_lambda, point.score, lengths.mean, lengths.p90)


def _on_grid(curve: Sequence[Stop], step: float) -> Sequence[Stop]:
    """The points that the server can run exactly; all, where it can none."""
    cells = round(1 / step)
    exact = [it for it in curve if _off_grid(it.reasoning_lambda, cells) < _ROUNDING]
    return exact or curve


def _off_grid(value: float, cells: int) -> float:
    """How far λ is from the next point of the grid."""
    return abs(value - round(value * cells) / cells)


def _stops(front: Sequence[Stop], curve: Sequence[Stop], step: float) -> Iterable[Stop]:
    """The front, and between neighbours in λ what lies on the grid."""
    neighbours = {frozenset(pair) for pair in pairwise(curve)}
    yield front[0]
    for low, high in pairwise(front):
        if frozenset((low, high)) in neighbours:
            yield from (_between(low, high, value) for value in _cells(low, high, step))
        yield high


def _cells(start: Stop, end: Stop, step: float) -> Sequence[float]:
    """λ values of the grid strictly between two stops, from the first to the second."""
    low, high = sorted((start.reasoning_lambda, end.reasoning_lambda))
    cells = round(1 / step)
    stride = max(1, cells // MOST_CELLS)
    values = [cell / cells for cell in range(0, cells + 1, stride)]
    inside = [value for value in values if low + _ROUNDING < value < high - _ROUNDING]
    return inside if start.reasoning_lambda == low else inside[::-1]


def _between(low: Stop, high: Stop, value: float) -> Stop:
    """The stop at λ on the line between two others."""
    share = (value - low.reasoning_lambda) / (high.reasoning_lambda - low.reasoning_lambda)

    def at(start: float, end: float) -> float:
        return start + share * (end - start)

    return Stop(value, at(low.score, high.score), at(low.mean, high.mean), at(low.p90, high.p90))


def _better(one: Stop, other: Stop) -> Stop:
    return other if other.score > one.score else one
