"""The queues of running and waiting sequences, ordered by priority, then by arrival."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from mi_runtime.scheduling.sequence import Sequence


class RequestQueue:
    """Sequences sorted by rank, with a count of how many of them are at each λ.

    A position is found in O(log n); inserting moves up to n words of memory.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._ranked: list[Sequence] = []
        self._lambdas: Counter[float] = Counter()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._ranked)

    @property
    def first(self) -> Sequence:
        return self._ranked[0]

    @property
    def last(self) -> Sequence:
        return self._ranked[-1]

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The distinct λ of the sequences, ascending."""
        return tuple(sorted(self._lambdas))

    def get(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.request_id] = sequence
        insort(self._ranked, sequence, key=_rank)
        self._lambdas[sequence.request.dial.reasoning_lambda] += 1

    def remove(self, sequence: Sequence) -> None:
        value = sequence.request.dial.reasoning_lambda
        del self._sequences[sequence.request_id]
        del self._ranked[bisect_left(self._ranked, sequence.rank, key=_rank)]
        self._lambdas[value] -= 1
        if not self._lambdas[value]:
            del self._lambdas[value]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
