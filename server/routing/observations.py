"""Reasoning tokens that answers really had, by routing class and λ bucket, as streaming quantiles.

An answer whose think block was cut, by its cap or by its length, would have reasoned longer, nobody
knows how much. Left out, it would make every quantile too short; so it counts as longer than every
block that ended by itself. A quantile among the cut ones is unknown, and says so.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from fastdigest import TDigest

from server.routing.lambda_buckets import LAMBDA_BUCKETS, lambda_bucket

QUANTILES: Final = (0.5, 0.9)
_CENTROIDS: Final = 100  # of a digest: a few kilobytes, and the p90 within a per cent


class Digest:
    """The think blocks of one class and bucket."""

    def __init__(self) -> None:
        self._complete = TDigest(max_centroids=_CENTROIDS)
        self.cut = 0
        self.total = 0  # tokens, those of cut blocks too

    def add(self, tokens: int, *, cut: bool) -> None:
        self.total += tokens
        if cut:
            self.cut += 1
        else:
            self._complete.update(float(tokens))

    @property
    def samples(self) -> int:
        return self._complete.n_values + self.cut

    @property
    def mean(self) -> float | None:
        """Tokens an answer spent, as it was capped."""
        return self.total / self.samples if self.samples else None

    def quantile(self, share: float) -> float | None:
        """None where it lies among the blocks that were cut, or nothing was seen."""
        complete = self._complete.n_values
        rank = share * self.samples
        return self._complete.quantile(rank / complete) if 0 < rank <= complete else None


class Observations:
    """A digest for each class of the profile and each of the ten buckets, and no more."""

    def __init__(self, classes: Iterable[str]) -> None:
        buckets = [lambda_bucket(low / LAMBDA_BUCKETS) for low in range(LAMBDA_BUCKETS)]
        self._digests = {(name, bucket): Digest() for name in classes for bucket in buckets}

    def add(self, routing_class: str, value: float, tokens: int, *, cut: bool) -> None:
        """An answer at λ = `value` ended with so many reasoning tokens."""
        self.at(routing_class, value).add(tokens, cut=cut)

    def at(self, routing_class: str, value: float) -> Digest:
        return self._digests[routing_class, lambda_bucket(value)]

    def seen(self) -> Iterator[tuple[str, str, Digest]]:
        """Class, bucket and digest, where there is anything."""
        for (name, bucket), digest in self._digests.items():
            if digest.samples:
                yield name, bucket, digest
