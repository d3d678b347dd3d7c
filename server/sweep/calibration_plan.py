"""Plans the rounds of a calibration: a grid of λ first, then more where the curve bends.

    1. Between neighbours whose scores or think rates differ by more than `most_bend`, the λ in the
       middle is measured, the sharpest bend first, down to gaps of `least_gap`.
    2. A λ whose interval of score or think rate is wider than `target_interval` gets more samples:
       as many as its spread requires, but at most twice what it has; the widest interval first.

It ends when neither rule wants more, or when the budget is too small for what they want. It is
plain Python, and the same samples give the same plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil


@dataclass(frozen=True, slots=True)
class Rules:
    """The parameters of a calibration. Scores, think rates and intervals are shares of 1."""

    grid: tuple[float, ...]  # the first λ values, ascending
    samples: int  # of each question at a new λ; at least 2
    budget: int  # samples in total
    target_interval: float  # width of a 95 % interval
    most_bend: float = 0.1  # difference between neighbours
    least_gap: float = 0.02  # distance of λ


@dataclass(frozen=True, slots=True)
class MeasuredLambda:
    """What is known about one λ so far."""

    reasoning_lambda: float
    samples: int  # of each question
    score: float
    think_rate: float
    width: float  # of the wider of its two intervals


@dataclass(frozen=True, slots=True)
class _Extension:
    """More samples at one λ, which may be new."""

    reasoning_lambda: float
    samples: int  # of each question, afterwards
    more: int  # of these, still to be collected


def next_round(
    measured: Sequence[MeasuredLambda], questions: int, rules: Rules
) -> dict[float, int]:
    """Returns by λ how many samples a question should have after the round; empty at the end.

    `measured` is in order of λ. The first grid is planned in full, whatever the budget.
    """
    if not measured:
        return dict.fromkeys(rules.grid, rules.samples)
    left = rules.budget - questions * sum(it.samples for it in measured)
    planned = {}
    for extension in [*_bisections(measured, rules), *_repetitions(measured, rules)]:
        if extension.more * questions <= left:
            left -= extension.more * questions
            planned[extension.reasoning_lambda] = extension.samples
    return planned


def _bisections(measured: Sequence[MeasuredLambda], rules: Rules) -> Iterator[_Extension]:
    """Yields a new λ in the middle of each bend, the sharpest bend first."""
    bends = [
        (_bend(low, high), low.reasoning_lambda, high.reasoning_lambda)
        for low, high in pairwise(measured)
    ]
    for bend, low, high in sorted(bends, key=lambda it: (-it[0], it[1])):
        middle = round((low + high) / 2, 2)
        if bend > rules.most_bend and min(middle - low, high - middle) >= rules.least_gap - 1e-9:
            yield _Extension(middle, rules.samples, rules.samples)


def _bend(low: MeasuredLambda, high: MeasuredLambda) -> float:
    return max(abs(low.score - high.score), abs(low.think_rate - high.think_rate))


def _repetitions(measured: Sequence[MeasuredLambda], rules: Rules) -> Iterator[_Extension]:
    """Yields more samples for each λ whose interval is too wide, the widest first."""
    for it in sorted(measured, key=lambda it: (-it.width, it.reasoning_lambda)):
        if it.width > rules.target_interval:
            # The width of an interval falls with the square root of the samples.
            needed = ceil(it.samples * (it.width / rules.target_interval) ** 2)
            samples = min(max(needed, it.samples + 1), 2 * it.samples)
            yield _Extension(it.reasoning_lambda, samples, samples - it.samples)
