"""Chooses, step by step, which rows run together and how each forward has its weights.

A step may run as one forward over all its rows, or as several: the rows of one dial alone can take
endpoint or blended weights and half the arithmetic, at the price of one more forward. The choice is
the cheapest by a cost model measured at start-up:

    forward(way, R) = fixed + seconds(way, R)        R rows; way: single weights, or the pair

`fixed` is what a forward costs whatever its rows, most of it launches by the host. Forwards of
single tokens alone have less of it where they are recorded: they are replayed by one launch. A part
with a prompt's tokens never is.

Building blended weights is never waited for: a λ that is new runs by the pair product. Each step
notes what blended weights would have saved; once a dial's savings reach the price of building them,
they are built (for one dial, at most twice the cost of knowing the future). A prefill chunk large
enough to pay for them alone gets them at once. Where the cache is full, a dial must also have been
saving for longer than the weights it would push out have been idle: more hot λ values than fit do
not push each other out in turn.

Plain Python: seconds, rows and dials; no tensors.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from mi_runtime.config import BlendPolicy
from mi_runtime.request import Dial
from mi_runtime.scheduling.chunk import Chunk

MAX_ALONE = 8  # dials a step that run in forwards of their own
REMEMBERED = 1024  # dials whose savings are kept


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by rows, linear between measured points and beyond the last two."""

    rows: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        high = min(max(1, bisect_left(self.rows, rows)), len(self.rows) - 1)
        (r0, r1), (s0, s1) = self.rows[high - 1 : high + 1], self.seconds[high - 1 : high + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


@dataclass(frozen=True, slots=True)
class Workload:
    """How much a forward has to compute."""

    rows: int
    chunks: int

    @property
    def decodes_alone(self) -> bool:
        return self.rows == self.chunks

    def __sub__(self, other: "Workload") -> "Workload":
        return Workload(self.rows - other.rows, self.chunks - other.chunks)


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a forward costs on this device at these shapes; all in seconds."""

    fixed: float  # of a forward, whatever its rows
    replayed: float  # likewise of decodes alone; the same where they are not recorded
    single: Curve  # endpoint or blended weights
    pair: Curve
    build: float  # all blended weights of one λ

    def forward(self, way: Curve, load: Workload) -> float:
        """Of one, or none where there is nothing to compute."""
        if not load.rows:
            return 0.0
        return (self.replayed if load.decodes_alone else self.fixed) + way.at(load.rows)


NOTHING = Curve((1, 2), (0.0, 0.0))
NO_COSTS = CostModel(0.0, 0.0, NOTHING, NOTHING, build=0.0)  # where one way is forced


@dataclass(frozen=True, slots=True)
class SubBatch:
    """Chunks that run in one forward; `blended`: groups of one λ take blended weights."""

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
    """What a dial missed so far by having no blended weights."""

    since: int  # step
    seconds: float = 0.0


class Planner:
    """`missing(dial)` is the share of a dial's blended weights that the cache lacks, `capacity` how
    many λ values it can hold, and `endpoints` the λ that need none."""

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
        self._built: OrderedDict[Dial, int] = OrderedDict()  # the step of last use, oldest first

    def plan(self, chunks: list[Chunk]) -> list[SubBatch]:
        """Every chunk in exactly one part."""
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
        parts = [SubBatch(work.chunks, blended=True) for work in alone]
        return [*parts, SubBatch(together, blended=False)] if together else parts

    def _choose(self, works: list[_Work], load: Workload) -> list[_Work]:
        """The dials that run alone, with single weights, out of `load` in all."""
        works = sorted(works, key=lambda work: work.rows, reverse=True)
        ready = [work for work in works if self._is_ready(work.dial)]
        best, seconds = self._cheapest(ready, load)
        if len(ready) == len(works) or not self._note_savings(works, load, seconds):
            return best
        return self._cheapest([work for work in works if self._is_ready(work.dial)], load)[0]

    def _cheapest(self, works: Sequence[_Work], load: Workload) -> tuple[list[_Work], float]:
        """Which of `works`, largest first, to run alone out of `load` in all; and the seconds."""
        costs, best, spent = self.costs, 0, 0.0
        works = self._affordable(works)
        seconds = costs.forward(costs.pair, load)
        for count, work in enumerate(works, start=1):
            load -= work.load
            spent += costs.forward(costs.single, work.load)
            total = spent + costs.forward(costs.pair, load)
            if total < seconds:
                best, seconds = count, total
        return works[:best], seconds

    def _affordable(self, works: Sequence[_Work]) -> list[_Work]:
        """The first of them that the cache can hold together; endpoints take no room in it."""
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
        """Credits the dials that would have run alone, had they been ready, by their rows.

        True when one of them has earned its weights by it.
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
        """Whether single weights are there, or have earned being built."""
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
        """Whether building pushes nothing out that was used while the dial was saving."""
        if dial in self._built or len(self._built) < self._capacity:
            return True
        return next(iter(self._built.values())) < savings.since

    def _use(self, dial: Dial) -> None:
        """The dial runs with single weights, which are built if they were not there."""
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
    """Chunks by their dial, without those whose rows have more than one."""
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
