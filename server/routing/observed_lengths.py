"""Keeps quantiles of the reasoning tokens of finished answers, by routing class and λ bucket.

A think block that was truncated, by its cap or by the answer's length, would have been longer, by
an unknown number of tokens. Leaving it out would make every quantile too short, so it counts as
longer than every block that ended by itself. A quantile that falls among truncated blocks is
unknown (None).
"""

from collections.abc import Iterable, Iterator
from typing import Final

from fastdigest import TDigest

from server.routing.lambda_buckets import LAMBDA_BUCKETS, lambda_bucket

QUANTILES: Final = (0.5, 0.9)
_CENTROIDS: Final = 100  # of a digest, which takes a few kilobytes and has the p90 within 1 %


class LengthDigest:
    """The lengths of the think blocks of one routing class and one λ bucket."""

    def __init__(self) -> None:
        self._complete = TDigest(max_centroids=_CENTROIDS)
        self.cut = 0  # truncated blocks
        self.total = 0  # tokens, with those of truncated blocks

    def add(self, tokens: int, *, cut: bool) -> None:
        self.total += tokens
        if cut:
            self.cut += 1
        else:
            self._complete.update(float(tokens))

    @property
    def samples(self) -> int:
        """Number of blocks, truncated ones included."""
        return self._complete.n_values + self.cut

    @property
    def mean(self) -> float | None:
        """Mean tokens of a block, as many as it had if it was truncated. None without blocks."""
        return self.total / self.samples if self.samples else None

    def quantile(self, share: float) -> float | None:
        """Returns the number of tokens that `share` (0 to 1) of the blocks do not exceed.

        None without blocks, or if the quantile falls among truncated blocks.
        """
        complete = self._complete.n_values
        rank = share * self.samples
        return self._complete.quantile(rank / complete) if 0 < rank <= complete else None


class ObservedLengths:
    """A digest for each routing class of the profile and each λ bucket; their number is fixed."""

    def __init__(self, classes: Iterable[str]) -> None:
        buckets = [lambda_bucket(low / LAMBDA_BUCKETS) for low in range(LAMBDA_BUCKETS)]
        self._digests = {(name, bucket): LengthDigest() for name in classes for bucket in buckets}

    def add(self, routing_class: str, value: float, tokens: int, *, cut: bool) -> None:
        """Counts an answer at λ = `value` that ended with `tokens` reasoning tokens."""
        self.at(routing_class, value).add(tokens, cut=cut)

    def at(self, routing_class: str, value: float) -> LengthDigest:
        """Returns the digest of λ = `value`. Raises `KeyError` for an unknown class."""
        return self._digests[routing_class, lambda_bucket(value)]

    def filled(self) -> Iterator[tuple[str, str, LengthDigest]]:
        """Yields class, bucket and digest of every digest that has samples."""
        for (name, bucket), digest in self._digests.items():
            if digest.samples:
                yield name, bucket, digest
