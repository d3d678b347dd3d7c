"""The numbers of one setting, each with a 95 % bootstrap interval over questions.

With n samples of a question, c of them correct:

    Mean@k   c / n
    Pass@k   1 − C(n−c, k) / C(n, k): the chance that k of the n, drawn without replacement, hold a
             correct one (unbiased; Chen et al. 2021). k is the least n of all questions
    Vote@k   whether the most frequent reading is correct; equally frequent readings count with
             equal shares. Samples without a reading do not vote; if none votes, it is 0

A number is the mean over the questions; so are means of tokens and shares of samples, each first
computed for every question. A quantile is over all samples together: the least value that at least
a share p of them does not exceed.

The bootstrap draws questions with replacement, together with their samples: it covers the choice of
the questions and the sampling. If every answer is correct, the interval has no width, because no
sample shows anything else. It is plain Python; the same seed gives the same intervals.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb, sqrt
from operator import mul
from random import Random
from statistics import fmean
from typing import Final

from server.sweep.samples import Sample

RESAMPLES: Final = 1000
_TAIL: Final = 0.025
_DEVIATIONS: Final = 1.96  # of a 95 % interval of a normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


Answers = Sequence[Sample]
"""The samples of one question."""


def pass_at(k: int, count: int, correct: int) -> float:
    """Returns Pass@k of `count` samples, of which `correct` are correct; 1 ≤ k ≤ count."""
    return 1.0 - comb(count - correct, k) / comb(count, k)


def vote(answers: Answers) -> float:
    """Returns the share of correct readings among the most frequent ones."""
    votes = Counter(it.said for it in answers if it.said is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = {it.said for it in answers if it.correct}
    winners = [reading for reading, count in votes.items() if count == most]
    return sum(reading in right for reading in winners) / len(winners)


def grouped(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Groups samples by question, in the order of first appearance."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.question, []).append(sample)
    return list(groups.values())


def sampling_width(values: Sequence[Sequence[float]]) -> float:
    """Returns the width of the 95 % interval that more samples of the same questions would shrink.

    `values` has those of each question, at least 2. The spread within questions counts, and the
    spread between questions does not, as the questions are the same at every λ.
    """
    spread = 0.0
    for own in values:
        mean = fmean(own)
        spread += sum((value - mean) ** 2 for value in own) / (len(own) - 1) / len(own)
    return 2 * _DEVIATIONS * sqrt(spread) / len(values)


_PER_QUESTION: Final[Mapping[str, Callable[[Answers], float]]] = {
    "mean_at_k": lambda own: fmean(it.correct for it in own),
    "vote_at_k": vote,
    "think_rate": lambda own: fmean(it.thought for it in own),
    "tokens_mean": lambda own: fmean(it.tokens for it in own),
    "reasoning_tokens_mean": lambda own: fmean(it.reasoning_tokens for it in own),
    "answer_tokens_mean": lambda own: fmean(it.answer_tokens for it in own),
    "malformed": lambda own: fmean(it.malformed for it in own),
    "unfinished": lambda own: fmean(it.unfinished for it in own),
}
_TOKENS: Final[Mapping[str, Callable[[Sample], int]]] = {
    "tokens": lambda sample: sample.tokens,
    "reasoning_tokens": lambda sample: sample.reasoning_tokens,
}
_QUANTILES: Final = (("p50", 0.5), ("p90", 0.9))


def estimate(
    samples: Iterable[Sample], *, seed: str, votes: bool, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Returns the numbers by name, with `pass_at_k` and `pass_at_1`, `_2`, `_4` … below k.

    `samples` holds at least one. Without `votes` there is no `vote_at_k`.
    """
    groups = grouped(samples)
    means = _columns(groups, votes)
    tokens = {name: _Pooled.of(groups, count) for name, count in _TOKENS.items()}
    drawn: dict[str, list[float]] = {}
    for weights in _resampled(len(groups), Random(seed), resamples):
        for name, value in _numbers(weights, means, tokens):
            drawn.setdefault(name, []).append(value)
    measured = _numbers([1] * len(groups), means, tokens)
    return {name: _with_interval(value, drawn[name]) for name, value in measured}


def least_samples(samples: Iterable[Sample]) -> int:
    """Returns k, the least number of samples that any question has."""
    return min(map(len, grouped(samples)))


def _columns(groups: Sequence[Answers], votes: bool) -> dict[str, list[float]]:
    """Returns by name the values of all questions."""
    most = min(map(len, groups))
    names = [name for name in _PER_QUESTION if votes or name != "vote_at_k"]
    columns = {name: [_PER_QUESTION[name](own) for own in groups] for name in names}
    columns["pass_at_k"] = _passes(groups, most)
    k = 1
    while k < most:
        columns[f"pass_at_{k}"] = _passes(groups, k)
        k *= 2
    return columns


def _passes(groups: Sequence[Answers], k: int) -> list[float]:
    return [pass_at(k, len(own), sum(it.correct for it in own)) for own in groups]


@dataclass(frozen=True, slots=True)
class _Pooled:
    """The values of all samples in ascending order, and the index of each one's question."""

    values: list[int]
    owners: list[int]

    @classmethod
    def of(cls, groups: Sequence[Answers], count: Callable[[Sample], int]) -> "_Pooled":
        pairs = sorted((count(it), owner) for owner, own in enumerate(groups) for it in own)
        return cls([value for value, _ in pairs], [owner for _, owner in pairs])

    def quantiles(self, weights: Sequence[int]) -> list[int]:
        """Returns the quantiles, with each sample counted as often as its question was drawn."""
        ranks = list(accumulate(map(weights.__getitem__, self.owners)))
        return [self.values[bisect_left(ranks, share * ranks[-1])] for _, share in _QUANTILES]


def _resampled(count: int, random: Random, resamples: int) -> Iterable[list[int]]:
    """Yields for each of `resamples` resamples how often each question was drawn."""
    for _ in range(resamples):
        times = Counter(random.choices(range(count), k=count))
        yield [times[number] for number in range(count)]


def _numbers(
    weights: Sequence[int], means: Mapping[str, list[float]], tokens: Mapping[str, _Pooled]
) -> list[tuple[str, float]]:
    numbers = [
        (name, sum(map(mul, weights, column)) / len(weights)) for name, column in means.items()
    ]
    for name, pooled in tokens.items():
        quantiles = zip(_QUANTILES, pooled.quantiles(weights), strict=True)
        numbers += [(f"{name}_{short}", value) for (short, _), value in quantiles]
    return numbers


def _with_interval(value: float, drawn: list[float]) -> Estimate:
    ordered = sorted(drawn)
    cut = int(_TAIL * len(ordered))
    # Rounding of the mean may put the value itself just outside its percentile interval.
    return Estimate(value, min(value, ordered[cut]), max(value, ordered[-1 - cut]))
