"""Chooses λ from a measured curve: finds the points that are worth their tokens, and of these the
one that a budget or an effort selects. It is plain Python and knows nothing about requests.

Neither tokens nor score rise steadily with λ. So this module does not assume an order in λ; it uses
the *front*: the points for which no other point has as high a score at as few reasoning tokens. Ordered by
tokens, the front rises in score. A *candidate* is a λ that may be chosen: each point of the front,
and where two neighbours on the front are neighbours in λ as well, every λ of the grid between them,
with tokens and score interpolated linearly.

    score │          ┌──●  best               effort: the cheapest candidate with that share of
          │     ●───●                                 the score between cheapest and best
          │  ●        ×  dominated            budget: the best candidate whose p90 fits
          └──────────────── reasoning tokens

Everything is computed when the table is made; a decision is one bisection.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from server.routing.pareto import pareto_front
from server.routing.profiles import Point, RoutingClass

P90_PER_MEAN: Final = 1.8
"""Estimates the p90 if only a mean was published: exp(1.2816 σ - σ²/2), of a log-normal
distribution with σ = 0.6."""
MOST_CELLS: Final = 100  # λ values between 0 and 1 that interpolation considers
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class ExpectedLengths:
    """Reasoning tokens expected at one λ."""

    mean: float
    p90: float
    p90_source: str  # measured, estimated or observed


@dataclass(frozen=True, slots=True)
class Candidate:
    """A λ that may be chosen, and what is expected at it."""

    reasoning_lambda: float
    score: float
    mean: float  # reasoning tokens
    p90: float  # reasoning tokens


LengthsAt = Callable[[float], ExpectedLengths | None]
"""Returns what was observed at a λ, or None if there are too few samples."""


def nothing_observed(_: float) -> None:
    return None


class RoutingTable:
    """The decisions of one routing class, for a server whose λ grid has the step `step`."""

    def __init__(
        self, measured: RoutingClass, *, step: float, observed: LengthsAt = nothing_observed
    ) -> None:
        self.lengths = tuple(
            observed(point.reasoning_lambda) or published_lengths(point)
            for point in measured.points
        )
        self._curve = tuple(map(_candidate, measured.points, self.lengths))
        self.front = pareto_front(
            _on_grid(self._curve, step), tokens=lambda it: it.mean, score=lambda it: it.score
        )
        self.candidates = tuple(_candidates(self.front, self._curve, step))
        self._scores = [candidate.score for candidate in self.candidates]
        by_p90 = sorted(self.candidates, key=lambda it: it.p90)
        self._p90s = [candidate.p90 for candidate in by_p90]
        self._best = list(accumulate(by_p90, _better))

    @property
    def cheapest(self) -> Candidate:
        return self.candidates[0]

    def by_budget(self, tokens: float) -> Candidate:
        """Returns the best candidate whose p90 is within `tokens`, or the cheapest if none is."""
        fitting = bisect_right(self._p90s, tokens)
        return self._best[fitting - 1] if fitting else self.cheapest

    def by_effort(self, share: float) -> Candidate:
        """Returns the cheapest candidate with `share` (0 to 1) of the front's gain in score."""
        low, high = self._scores[0], self._scores[-1]
        target = low + share * (high - low) - _ROUNDING
        return self.candidates[min(bisect_left(self._scores, target), len(self.candidates) - 1)]

    def mean_at(self, value: float) -> float | None:
        """Returns the mean reasoning tokens at λ = `value`, interpolated between measured points.

        None outside the measured range.
        """
        at = bisect_left(self._curve, value, key=lambda it: it.reasoning_lambda)
        if at < len(self._curve) and self._curve[at].reasoning_lambda == value:
            return self._curve[at].mean
        if not 0 < at < len(self._curve):
            return None
        return _between(self._curve[at - 1], self._curve[at], value).mean


def published_lengths(point: Point) -> ExpectedLengths:
    """Returns the profile's own numbers; a missing p90 is estimated from the mean."""
    tokens = point.reasoning_tokens
    if tokens.p90 is not None:
        return ExpectedLengths(tokens.mean, tokens.p90, "measured")
    return ExpectedLengths(tokens.mean, tokens.mean * P90_PER_MEAN, "estimated")


def _candidate(point: Point, lengths: ExpectedLengths) -> Candidate:
    return Candidate(point.reasoning_lambda, point.score, lengths.mean, lengths.p90)


def _on_grid(curve: Sequence[Candidate], step: float) -> Sequence[Candidate]:
    """Returns the points that lie on the server's grid, or all of them if none does."""
    cells = round(1 / step)
    exact = [it for it in curve if _off_grid(it.reasoning_lambda, cells) < _ROUNDING]
    return exact or curve


def _off_grid(value: float, cells: int) -> float:
    """Returns the distance of λ from the nearest point of the grid."""
    return abs(value - round(value * cells) / cells)


def _candidates(
    front: Sequence[Candidate], curve: Sequence[Candidate], step: float
) -> Iterable[Candidate]:
    """Yields the front, and the grid points between its neighbours that are neighbours in λ too."""
    neighbours = {frozenset(pair) for pair in pairwise(curve)}
    yield front[0]
    for low, high in pairwise(front):
        if frozenset((low, high)) in neighbours:
            yield from (_between(low, high, value) for value in _cells(low, high, step))
        yield high


def _cells(start: Candidate, end: Candidate, step: float) -> Sequence[float]:
    """Returns the λ values of the grid strictly between two candidates, from first to second."""
    low, high = sorted((start.reasoning_lambda, end.reasoning_lambda))
    cells = round(1 / step)
    stride = max(1, cells // MOST_CELLS)
    values = [cell / cells for cell in range(0, cells + 1, stride)]
    inside = [value for value in values if low + _ROUNDING < value < high - _ROUNDING]
    return inside if start.reasoning_lambda == low else inside[::-1]


def _between(low: Candidate, high: Candidate, value: float) -> Candidate:
    """Returns the candidate at λ = `value`, interpolated linearly between two others."""
    share = (value - low.reasoning_lambda) / (high.reasoning_lambda - low.reasoning_lambda)

    def at(start: float, end: float) -> float:
        return start + share * (end - start)

    return Candidate(
        value, at(low.score, high.score), at(low.mean, high.mean), at(low.p90, high.p90)
    )


def _better(one: Candidate, other: Candidate) -> Candidate:
    return other if other.score > one.score else one
