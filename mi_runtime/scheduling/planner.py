"""The planner divides the chunks of a step into sub-batches and chooses which use blended weights.

A step runs as one forward pass over all its rows, or as several. In a sub-batch of their own, the
rows of one dial can use blended weights, which halves the arithmetic, at the cost of one more
forward pass. Here blended weights include an endpoint's, which cost the same and need not be built.
The planner takes the cheapest plan by a cost model that is measured at start-up:

    forward(way, R) = fixed + seconds(way, R)        R rows; way: blended, or the pair product

`fixed` is the cost of a forward pass that does not depend on its rows: mostly kernel launches by
the host. A sub-batch of decodes only costs less of it if decode steps are captured, because one
launch replays a CUDA graph. A sub-batch with prompt tokens is never replayed.

No request waits for blended weights to be built: a new λ runs by the pair product. Each step adds
up what blended weights would have saved. When the savings of a dial reach the cost of building its
weights, they are built; for one dial this costs at most twice what an optimal plan would. A prefill
chunk that is large enough to pay for them alone gets them at once. When the cache is full, a dial
must also have been saving for longer than the weights that it would evict have been idle, so that
more frequently used λ values than fit do not evict each other in turn.

Plain Python: seconds, rows and dials, no tensors.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from mi_runtime.config import BlendPolicy
from mi_runtime.request import Dial
from mi_runtime.scheduling.chunk import Chunk

MAX_ALONE = 8  # dials per step that run in a sub-batch of their own
REMEMBERED = 1024  # dials whose savings are remembered


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds by number of rows: linear between measured points, and beyond the last two."""

    rows: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        high = min(max(1, bisect_left(self.rows, rows)), len(self.rows) - 1)
        (r0, r1), (s0, s1) = self.rows[high - 1 : high + 1], self.seconds[high - 1 : high + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


@dataclass(frozen=True, slots=True)
class Workload:
    """How much a forward pass computes."""

    rows: int
    chunks: int

    @property
    def only_decodes(self) -> bool:
        return self.rows == self.chunks

    def __sub__(self, other: "Workload") -> "Workload":
        return Workload(self.rows - other.rows, self.chunks - other.chunks)


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of a forward pass on this device at this model's shapes, in seconds."""

    fixed: float  # per forward pass, whatever its rows
    replayed: float  # the same for decodes only; equal to `fixed` if they are not captured
    blended: CostCurve  # blended weights, or an endpoint's
    pair: CostCurve
    build: float  # to build all blended weights of one λ

    def forward(self, way: CostCurve, load: Workload) -> float:
        """Returns the seconds of one forward pass, 0 if it has no rows."""
        if not load.rows:
            return 0.0
        return (self.replayed if load.only_decodes else self.fixed) + way.at(load.rows)


NOTHING = CostCurve((1, 2), (0.0, 0.0))
NO_COSTS = CostModel(0.0, 0.0, NOTHING, NOTHING, build=0.0)  # for policies that force one way


@dataclass(frozen=True, slots=True)
class SubBatch:
    """The chunks that run in one forward pass.

    With `blended`, a blend group whose rows all have one λ uses blended weights.
    """

    chunks: list[Chunk]
    blended: bool


@dataclass(slots=True)
class _Work:
    """The chunks of one dial in a step."""

    dial: Dial
    chunks: list[Chunk] = field(default_factory=list)
    rows: int = 0

    @property
    def load(self) -> Workload:
        return Workload(self.rows, len(self.chunks))


@dataclass(slots=True)
class _Savings:
    """How much time blended weights of a dial would have saved so far."""

    since: int  # the step in which it was first credited
    seconds: float = 0.0


class Planner:
    """Plans the sub-batches of every step.

    `missing(dial)` is the share of a dial's blended weights that the cache lacks, `capacity` the
    number of λ values that the cache can hold, and `endpoints` the λ values that need none.
    """

    def __init__(
        self,
        policy: BlendPolicy,
        costs: CostModel,
        missing: Callable[[Dial], float],
        capacity: int,
        endpoints: Container[float] = (0.0, 1.0),
    ) -> None:
        self._policy = policy
        self.costs = costs
        self._missing = missing
        self._capacity = capacity
        self._endpoints = endpoints
        self._step = 0
        self._savings: OrderedDict[Dial, _Savings] = OrderedDict()
        self._built: OrderedDict[Dial, int] = OrderedDict()  # step of last use, oldest first

    def plan(self, chunks: list[Chunk]) -> list[SubBatch]:
        """Returns the sub-batches of a step; every chunk is in exactly one of them."""
        self._step += 1
        if self._policy == "pair":
            return [SubBatch(chunks, blended=False)]
        works = _by_dial(chunks)
        if self._policy == "blended":
            alone = works
        else:
            alone = self._choose(
                works, Workload(sum(chunk.length for chunk in chunks), len(chunks))
            )
        chosen = {work.dial for work in alone}
        for dial in chosen:
            self._use(dial)
        if not chosen:
            return [SubBatch(chunks, blended=False)]
        together = [chunk for chunk in chunks if not _is_alone(chunk, chosen)]
        sub_batches = [SubBatch(work.chunks, blended=True) for work in alone]
        if together:
            sub_batches.append(SubBatch(together, blended=False))
        return sub_batches

    def _choose(self, works: list[_Work], load: Workload) -> list[_Work]:
        """Returns the dials to run alone with blended weights; `load` is that of the step."""
        works = sorted(works, key=lambda work: work.rows, reverse=True)
        ready = [work for work in works if self._is_ready(work.dial)]
        best, seconds = self._cheapest(ready, load)
        if len(ready) == len(works) or not self._note_savings(works, load, seconds):
            return best
        return self._cheapest([work for work in works if self._is_ready(work.dial)], load)[0]

    def _cheapest(self, works: Sequence[_Work], load: Workload) -> tuple[list[_Work], float]:
        """Returns which of `works`, largest first, to run alone, and the seconds of the step."""
        costs, best, spent = self.costs, 0, 0.0
        works = self._affordable(works)
        seconds = costs.forward(costs.pair, load)
        for count, work in enumerate(works, start=1):
            load -= work.load
            spent += costs.forward(costs.blended, work.load)
            total = spent + costs.forward(costs.pair, load)
            if total < seconds:
                best, seconds = count, total
        return works[:best], seconds

    def _affordable(self, works: Sequence[_Work]) -> list[_Work]:
        """Returns the first of `works` that fit in the cache together; endpoints need no room."""
        chosen, room = [], self._capacity
        for work in works:
            if not self._is_endpoint(work.dial):
                if not room:
                    continue
                room -= 1
            chosen.append(work)
            if len(chosen) == MAX_ALONE:
                break
        return chosen

    def _note_savings(self, works: Sequence[_Work], load: Workload, seconds: float) -> bool:
        """Credits the dials that would have run alone if their weights had been ready.

        The saved `seconds` are divided by rows. Returns whether one of the dials has now earned
        its weights.
        """
        wished, possible = self._cheapest(works, load)
        absent = [work for work in wished if not self._is_ready(work.dial)]
        if not absent or possible >= seconds:
            return False
        share = (seconds - possible) / sum(work.rows for work in absent)
        for work in absent:
            savings = self._savings.pop(work.dial, None) or _Savings(since=self._step)
            savings.seconds += share * work.rows
            self._savings[work.dial] = savings
        while len(self._savings) > REMEMBERED:
            self._savings.popitem(last=False)
        return any(self._is_ready(work.dial) for work in absent)

    def _is_ready(self, dial: Dial) -> bool:
        """Whether a dial's blended weights exist, or have earned being built."""
        if self._is_endpoint(dial):
            return True
        if not self._capacity:
            return False
        price = self.costs.build * self._missing(dial)
        if price == 0:
            return True
        savings = self._savings.get(dial)
        return savings is not None and savings.seconds >= price and self._has_room(dial, savings)

    def _has_room(self, dial: Dial, savings: "_Savings") -> bool:
        """Whether building evicts no weights that were used while the dial was saving."""
        if dial in self._built or len(self._built) < self._capacity:
            return True
        return next(iter(self._built.values())) < savings.since

    def _use(self, dial: Dial) -> None:
        """Notes that the dial runs with blended weights, which are built if they do not exist."""
        self._savings.pop(dial, None)
        if not self._is_endpoint(dial):
            self._built.pop(dial, None)
            self._built[dial] = self._step
            while len(self._built) > max(1, self._capacity):
                self._built.popitem(last=False)

    def _is_endpoint(self, dial: Dial) -> bool:
        if dial.reasoning_lambda not in self._endpoints:
            return False
        return all(value in self._endpoints for _, value in dial.groups)


def _by_dial(chunks: list[Chunk]) -> list[_Work]:
    """Groups chunks by dial, leaving out those that have more than one."""
    works: dict[Dial, _Work] = {}
    for chunk in chunks:
        dial = chunk.dial
        if dial is None:
            continue
        work = works.get(dial)
        if work is None:
            work = works[dial] = _Work(dial)
        work.chunks.append(chunk)
        work.rows += chunk.length
    return list(works.values())


def _is_alone(chunk: Chunk, chosen: set[Dial]) -> bool:
    return chunk.dial is not None and chunk.dial in chosen
