"""Which λ a calibration asks for next: a first grid, then more where the curve bends.

    1. Between neighbours whose scores or think rates differ by more than `most_bend`, the λ in the
       middle is measured, the sharpest bend first, down to gaps of `least_gap`.
    2. A λ whose score or think rate is not known to `target_interval` gets more samples, as many as
       its spread says that it needs, but at most as many as it has; the widest interval first.

It ends where neither wish is left or the budget holds no more of them. Plain Python: the same
samples give the same plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil


@dataclass(frozen=True, slots=True)
class Rules:
    """Shares of 1 where nothing is said."""

    grid: tuple[float, ...]  # the first λ values, ascending
    samples: int  # of each question at a new λ; at least 2
    budget: int  # samples in all
    target_interval: float  # width, of 95 %
    most_bend: float = 0.1
    least_gap: float = 0.02  # of λ


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of one λ so far."""

    reasoning_lambda: float
    samples: int  # of each question
    score: float
    think_rate: float
    width: float  # of the wider interval of the two


@dataclass(frozen=True, slots=True)
class _Wish:
    reasoning_lambda: float
    samples: int  # of each question, then
    more: int  # of them not there yet


def next_round(measured: Sequence[Measured], questions: int, rules: Rules) -> dict[float, int]:
    """By λ, the samples of each question that it shall have; empty: the end.

    `measured` is in order of λ. The first grid is asked for whole, whatever the budget.
    """
    if not measured:
        return dict.fromkeys(rules.grid, rules.samples)
    left = rules.budget - questions * sum(it.samples for it in measured)
    granted = {}
    for wish in [*_splits(measured, rules), *_sharper(measured, rules)]:
        if wish.more * questions <= left:
            left -= wish.more * questions
            granted[wish.reasoning_lambda] = wish.samples
    return granted


def _splits(measured: Sequence[Measured], rules: Rules) -> Iterator[_Wish]:
    """The middles of bends, the sharpest first."""
    bends = [
        (_bend(low, high), low.reasoning_lambda, high.reasoning_lambda)
        for low, high in pairwise(measured)
    ]
    for bend, low, high in sorted(bends, key=lambda it: (-it[0], it[1])):
        middle = round((low + high) / 2, 2)
        if bend > rules.most_bend and min(middle - low, high - middle) >= rules.least_gap - 1e-9:
            yield _Wish(middle, rules.samples, rules.samples)


def _bend(low: Measured, high: Measured) -> float:
    return max(abs(low.score - high.score), abs(low.think_rate - high.think_rate))


def _sharper(measured: Sequence[Measured], rules: Rules) -> Iterator[_Wish]:
    """More samples where the interval is too wide, the widest first."""
    for it in sorted(measured, key=lambda it: (-it.width, it.reasoning_lambda)):
        if it.width > rules.target_interval:
            # An interval narrows with the root of the samples.
            needed = ceil(it.samples * (it.width / rules.target_interval) ** 2)
            samples = min(max(needed, it.samples + 1), 2 * it.samples)
            yield _Wish(it.reasoning_lambda, samples, samples - it.samples)
