"""The planner chooses the cheapest way for each dial, and builds weights once that pays.

Costs are in seconds and made up. A plan is compared by the planner's own cost model: a
forward of R rows costs `fixed + blended(R)` where its rows have blended weights and
`fixed + pair(R)` otherwise, and one of decodes only has `replayed` in place of `fixed`. Building is
paid for by savings and is not part of that sum.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_runtime.request import Dial, EngineRequest
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import (
    MAX_ALONE,
    REMEMBERED,
    CostCurve,
    CostModel,
    Planner,
    SubBatch,
)
from mi_runtime.scheduling.sequence import Sequence

ENDPOINTS = (Dial(0.0), Dial(1.0), Dial(0.0, (("0.attn", 1.0),)))
DIALS = (*ENDPOINTS, *(Dial(value / 10) for value in range(1, 10)), Dial(0.5, (("head", 0.2),)))
Work = tuple[Dial | None, int]  # a dial, None if it switches inside the chunk, and its rows


def chunk(work: Work) -> Chunk:
    dial, rows = work
    own = Dial(0.3) if dial is None else dial
    sequence = Sequence(EngineRequest("r", (5,) * max(2, rows), own, answer_dial=Dial(0.8)))
    if dial is None:
        sequence.switch_at = 1
        assert rows > 1
    return Chunk(sequence, 0, rows)


def chunks_of(works: Iterable[Work]) -> list[Chunk]:
    return [chunk(work) for work in works]


def affine(at_zero: float, a_row: float) -> CostCurve:
    return CostCurve((0, 1), (at_zero, at_zero + a_row))


# Decode-like: a forward of blended weights costs half a pair forward, and 1 s in any case.
PLAIN = CostModel(1.0, 1.0, blended=affine(4.0, 0.1), pair=affine(8.0, 0.2), build=40.0)


class Weights:
    """Holds the blended weights of `capacity` dials, and evicts the least recently used."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[Dial, None] = OrderedDict()
        self.builds: Counter[Dial] = Counter()

    def missing(self, dial: Dial) -> float:
        return float(dial not in self.held)

    def run(self, parts: list[SubBatch]) -> None:
        for dial in dials_alone(parts):
            if dial in ENDPOINTS:
                continue
            self.builds[dial] += dial not in self.held
            self.held[dial] = None
            self.held.move_to_end(dial)
        while len(self.held) > self.capacity:
            self.held.popitem(last=False)


class PlannerRun:
    """Runs a planner over these weights, step by step."""

    def __init__(self, costs: CostModel = PLAIN, capacity: int = 4) -> None:
        self.costs = costs
        self.weights = Weights(capacity)
        self.planner = Planner("auto", costs, self.weights.missing, capacity)
        self.spent = 0.0  # seconds in forwards
        self.pair_only = 0.0  # seconds, had every step been one pair forward

    def step(self, *works: Work) -> list[SubBatch]:
        parts = self.planner.plan(chunks_of(works))
        self.weights.run(parts)
        self.spent += seconds(self.costs, parts)
        self.pair_only += seconds(self.costs, [SubBatch(chunks_of(works), blended=False)])
        return parts


def rows(part: SubBatch) -> int:
    return sum(one.length for one in part.chunks)


def seconds(costs: CostModel, parts: Iterable[SubBatch]) -> float:
    return sum(
        (costs.replayed if all(one.length == 1 for one in part.chunks) else costs.fixed)
        + (costs.blended if part.blended else costs.pair).at(rows(part))
        for part in parts
    )


def dials_alone(parts: list[SubBatch]) -> set[Dial]:
    """Returns the dials of the parts with blended weights, of which each has one dial."""
    found = [{one.dial for one in part.chunks} for part in parts if part.blended]
    assert all(len(dials) == 1 and None not in dials for dials in found)
    return {dial for dials in found for dial in dials if dial is not None}


def planner(
    policy: str = "auto",
    costs: CostModel = PLAIN,
    missing: Callable[[Dial], float] = lambda dial: 1.0,
    capacity: int = 4,
    endpoints: tuple[float, ...] = (0.0, 1.0),
) -> Planner:
    return Planner(policy, costs, missing, capacity, endpoints)  # type: ignore[arg-type]


# --- What the tests draw ------------------------------------------------------------------------

WORKS = st.lists(
    st.tuples(st.sampled_from(DIALS), st.integers(1, 60))
    | st.tuples(st.none(), st.integers(2, 60)),
    min_size=1,
    max_size=16,
)
CAPACITIES = st.integers(0, 12)
SECONDS = st.floats(0.0, 50.0)


@st.composite
def affine_costs(draw: st.DrawFn) -> CostModel:
    """Draws straight curves, in which a row of the pair costs no less than a blended one.

    A replay costs what a launched forward costs.
    """
    fixed = draw(SECONDS)
    blended = affine(draw(SECONDS), draw(SECONDS))
    pair = affine(draw(SECONDS), blended.seconds[1] - blended.seconds[0] + draw(SECONDS))
    return CostModel(fixed, fixed, blended, pair, build=draw(SECONDS))


@st.composite
def any_costs(draw: st.DrawFn) -> CostModel:
    """Draws curves as a noisy measurement may give them."""

    def curve() -> CostCurve:
        return CostCurve((1, 8, 32), tuple(sorted(draw(st.tuples(SECONDS, SECONDS, SECONDS)))))

    return CostModel(draw(SECONDS), draw(SECONDS), curve(), curve(), build=draw(SECONDS))


# --- Curves -------------------------------------------------------------------------------------

CURVE = CostCurve((1, 8, 32), (1.0, 8.0, 20.0))


@pytest.mark.parametrize(
    ("at", "expected"),
    [(1, 1.0), (8, 8.0), (32, 20.0), (2, 2.0), (20, 14.0), (34, 21.0), (512, 260.0)],
)
def test_a_curve_is_linear_between_its_points_and_extrapolated_after_the_last(
    at: int, expected: float
) -> None:
    assert CURVE.at(at) == pytest.approx(expected)


# --- Plans --------------------------------------------------------------------------------------


@given(works=WORKS, policy=st.sampled_from(["auto", "pair", "blended"]), costs=any_costs())
def test_every_chunk_is_in_exactly_one_part_in_the_same_order(
    works: list[Work], policy: str, costs: CostModel
) -> None:
    chunks = chunks_of(works)
    parts = planner(policy, costs, missing=lambda dial: 0.0).plan(chunks)
    place = {id(one): index for index, one in enumerate(chunks)}
    placed = [[place[id(one)] for one in part.chunks] for part in parts]
    assert sorted(chain(*placed)) == list(range(len(chunks)))
    assert all(one == sorted(one) and one for one in placed)  # decodes stay before prefills


@given(works=WORKS)
def test_the_policy_pair_runs_one_pair_forward(works: list[Work]) -> None:
    chunks = chunks_of(works)
    assert planner("pair").plan(chunks) == [SubBatch(chunks, blended=False)]


@given(works=WORKS, capacity=CAPACITIES)
def test_the_policy_blended_runs_every_dial_alone(works: list[Work], capacity: int) -> None:
    parts = planner("blended", capacity=capacity).plan(chunks_of(works))
    dials = {dial for dial, _ in works}
    assert dials_alone(parts) == dials - {None}
    assert len(parts) == len(dials)


@given(works=WORKS, costs=any_costs(), capacity=CAPACITIES, ready=st.sets(st.sampled_from(DIALS)))
def test_a_plan_never_costs_more_than_one_pair_forward_of_all_chunks(
    works: list[Work], costs: CostModel, capacity: int, ready: set[Dial]
) -> None:
    chunks = chunks_of(works)
    parts = planner("auto", costs, lambda dial: float(dial not in ready), capacity).plan(chunks)
    everything = seconds(costs, [SubBatch(chunks, blended=False)])
    assert seconds(costs, parts) <= everything * (1 + 1e-9)


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [((0.0, 1.0), {Dial(0.0), Dial(1.0)}), ((0.0,), {Dial(0.0)}), ((), set())],
)
def test_only_the_endpoints_of_the_model_need_not_be_built(
    endpoints: tuple[float, ...], expected: set[Dial]
) -> None:
    works: list[Work] = [(Dial(0.0), 40), (Dial(1.0), 40), (Dial(0.5), 40)]
    costs = CostModel(0.0, 0.0, blended=affine(1.0, 0.1), pair=affine(8.0, 0.2), build=1e9)
    plan = planner(costs=costs, endpoints=endpoints).plan(chunks_of(works))
    assert dials_alone(plan) == expected


@settings(max_examples=settings.default.max_examples // 2)
@given(
    works=st.lists(
        st.tuples(st.sampled_from(DIALS[:9]), st.integers(1, 60))
        | st.tuples(st.none(), st.integers(2, 60)),
        min_size=1,
        max_size=9,
    ),
    costs=affine_costs(),
    capacity=st.integers(0, 4),
)
def test_a_plan_is_the_cheapest_of_all_sets_of_dials_that_may_run_alone(
    works: list[Work], costs: CostModel, capacity: int
) -> None:
    """The curves are straight, so that the largest dial first is the best order.

    All weights are built, so that the plan depends on no savings.
    """
    chunks = chunks_of(works)
    dials = {dial for dial, _ in works if dial is not None}
    parts = planner("auto", costs, lambda dial: 0.0, capacity).plan(chunks)
    best = min(
        seconds(costs, plan_of(chunks, set(chosen)))
        for count in range(min(len(dials), MAX_ALONE) + 1)
        for chosen in combinations(sorted(dials, key=repr), count)
        if sum(dial not in ENDPOINTS for dial in chosen) <= capacity
    )
    assert seconds(costs, parts) == pytest.approx(best, rel=1e-9, abs=1e-9)


def plan_of(chunks: list[Chunk], chosen: set[Dial]) -> list[SubBatch]:
    parts = [
        SubBatch([one for one in chunks if one.dial == dial], blended=True)
        for dial in sorted(chosen, key=repr)
    ]
    rest = [one for one in chunks if one.dial not in chosen]
    return [*parts, SubBatch(rest, blended=False)] if rest else parts


@given(works=WORKS, costs=any_costs())
def test_without_room_for_blended_weights_only_endpoints_run_alone(
    works: list[Work], costs: CostModel
) -> None:
    parts = planner("auto", costs, lambda dial: 0.0, capacity=0).plan(chunks_of(works))
    assert dials_alone(parts) <= set(ENDPOINTS)


@pytest.mark.parametrize("dial", ENDPOINTS)
def test_endpoints_run_alone_without_room_and_without_building(dial: Dial) -> None:
    parts = planner(capacity=0).plan(chunks_of([(dial, 1), (Dial(0.5), 1)] * 100))
    assert dials_alone(parts) == {dial}


CAPTURED = CostModel(10.0, 0.5, PLAIN.blended, PLAIN.pair, build=40.0)  # decodes are replayed


def plan_of_hot(costs: CostModel, *works: Work) -> list[SubBatch]:
    return planner("auto", costs, lambda dial: 0.0).plan(chunks_of(works))


@pytest.mark.parametrize(
    ("costs", "split"), [(CAPTURED, True), (replace(CAPTURED, replayed=10.0), False)]
)
def test_decodes_of_hot_dials_run_apart_if_a_replay_is_cheap(costs: CostModel, split: bool) -> None:
    """Decodes are replayed; counted as launched forwards, they never ran apart."""
    decodes: list[Work] = [(Dial(0.3), 1), (Dial(0.6), 1)] * 16
    assert dials_alone(plan_of_hot(costs, *decodes)) == ({Dial(0.3), Dial(0.6)} if split else set())


def test_prefills_run_apart_only_if_a_launched_forward_is_cheap() -> None:
    prefills: list[Work] = [(Dial(0.3), 16), (Dial(0.6), 16)]
    assert dials_alone(plan_of_hot(CAPTURED, *prefills)) == set()
    assert dials_alone(plan_of_hot(replace(CAPTURED, fixed=0.5), *prefills)) == {
        Dial(0.3),
        Dial(0.6),
    }


def test_a_prefill_runs_apart_so_that_decodes_are_replayed() -> None:
    works: list[Work] = [(Dial(0.3), 60), *[(Dial(value / 10), 1) for value in (5, 6, 7)]]
    prefill, decodes = plan_of_hot(CAPTURED, *works)
    assert (prefill.blended, rows(prefill)) == (True, 60)
    assert (decodes.blended, rows(decodes)) == (False, 3)
    assert len(plan_of_hot(replace(CAPTURED, replayed=10.0), *works)) == 1


def test_a_plan_counts_the_rows_of_the_dials_beyond_the_largest() -> None:
    """A plan once counted only the largest dials, and split a step that had more of them."""
    costs = CostModel(0.5, 0.5, blended=affine(0.0, 0.1), pair=affine(8.0, 0.2), build=0.0)
    works = [(Dial(value / 100), 2) for value in range(1, MAX_ALONE + 9)]
    parts = planner("auto", costs, lambda dial: 0.0, capacity=100).plan(chunks_of(works))
    assert seconds(costs, parts) <= seconds(costs, [SubBatch(chunks_of(works), blended=False)])


def test_an_endpoint_runs_alone_even_after_a_dial_that_does_not_fit() -> None:
    works: list[Work] = [(Dial(0.4), 200), (Dial(0.6), 150), (Dial(1.0), 100)]
    parts = planner(missing=lambda dial: 0.0, capacity=1).plan(chunks_of(works))
    assert dials_alone(parts) == {Dial(0.4), Dial(1.0)}


# --- When building pays -------------------------------------------------------------------------


@given(value=st.integers(1, 99), others=st.lists(st.tuples(st.sampled_from(DIALS), st.just(1))))
def test_a_new_dial_is_not_built_for_a_small_decode(value: int, others: list[Work]) -> None:
    run = PlannerRun()
    run.step((Dial(value / 100), 1), *others)
    assert not run.weights.builds


def test_the_savings_of_a_large_prefill_do_not_build_the_weights_of_another_dial() -> None:
    run = PlannerRun()
    assert dials_alone(run.step((Dial(0.5), 1), (Dial(0.3), 600))) == {Dial(0.3)}


@given(rows=st.integers(1, 16), build=st.floats(1.0, 1000.0))
def test_a_hot_dial_is_built_once_its_savings_reach_the_price(rows: int, build: float) -> None:
    costs = CostModel(PLAIN.fixed, PLAIN.replayed, PLAIN.blended, PLAIN.pair, build)
    run, dial = PlannerRun(costs), Dial(0.5)
    saved = PLAIN.pair.at(rows) - PLAIN.blended.at(rows)
    steps = 0
    while not run.weights.builds:
        run.step((dial, rows))
        steps += 1
    assert (steps - 1) * saved < build * (1 + 1e-9) <= steps * saved * (1 + 2e-9)
    for _ in range(10):
        assert dials_alone(run.step((dial, rows))) == {dial}
    assert run.weights.builds[dial] == 1


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), costs=affine_costs())
def test_one_dial_costs_at_most_twice_the_best_plan_in_hindsight(
    lengths: list[int], costs: CostModel
) -> None:
    run = PlannerRun(costs)
    for length in lengths:
        run.step((Dial(0.5), length))
    total = run.spent + sum(run.weights.builds.values()) * costs.build
    blended = sum(costs.fixed + costs.blended.at(length) for length in lengths)
    known = min(run.pair_only, costs.build + blended)
    assert total <= 2 * known * (1 + 1e-9) + 1e-9


def test_a_large_prefill_of_one_dial_is_blended_at_once() -> None:
    enough = int(PLAIN.build / 0.1) + 1
    assert dials_alone(PlannerRun().step((Dial(0.5), enough))) == {Dial(0.5)}
    assert dials_alone(PlannerRun().step((Dial(0.5), 200))) == set()


def test_a_large_prefill_runs_apart_from_the_decodes_of_other_dials() -> None:
    decodes: list[Work] = [(Dial(0.1), 1), (Dial(0.2), 1), (Dial(0.9), 1)]
    parts = PlannerRun().step(*decodes, (Dial(0.5), 500))
    assert [(part.blended, rows(part)) for part in parts] == [(True, 500), (False, 3)]


def test_weights_that_are_built_in_part_cost_the_missing_part() -> None:
    half = planner(missing=lambda dial: 0.5)
    large = int(0.5 * PLAIN.build / 0.1)
    assert dials_alone(half.plan(chunks_of([(Dial(0.5), large + 1)])))
    assert not dials_alone(
        planner(missing=lambda dial: 0.5).plan(chunks_of([(Dial(0.5), large - 100)]))
    )


def test_hot_dials_that_do_not_fit_do_not_evict_each_other_in_turn() -> None:
    run = PlannerRun(capacity=2)
    for _ in range(400):
        for value in (0.2, 0.4, 0.6, 0.8):
            run.step((Dial(value), 4))
    assert run.weights.builds == {Dial(0.2): 1, Dial(0.4): 1}


def test_an_idle_dial_is_evicted_for_a_hot_one() -> None:
    run = PlannerRun(capacity=1)
    for dial in (Dial(0.3), Dial(0.6)):
        for _ in range(200):
            run.step((dial, 4))
    assert run.weights.builds == {Dial(0.3): 1, Dial(0.6): 1}


@settings(max_examples=settings.default.max_examples // 2)
@given(
    steps=st.lists(
        st.lists(st.tuples(st.sampled_from(DIALS), st.integers(1, 40)), min_size=1, max_size=6),
        min_size=1,
        max_size=40,
    ),
    costs=any_costs(),
    capacity=CAPACITIES,
)
def test_builds_never_cost_more_than_the_pair_product(
    steps: list[list[Work]], costs: CostModel, capacity: int
) -> None:
    """So the total is at most twice that of the pair product, with or without evictions."""
    run = PlannerRun(costs, capacity)
    for works in steps:
        run.step(*works)
    built = sum(run.weights.builds.values()) * costs.build
    assert built <= run.pair_only * (1 + 1e-9)
    assert run.spent <= run.pair_only * (1 + 1e-9)


def test_an_evicted_dial_must_save_its_price_again() -> None:
    run, dial = PlannerRun(capacity=1), Dial(0.5)
    while not run.weights.builds:
        run.step((dial, 8))
    run.weights.held.clear()
    assert dials_alone(run.step((dial, 8))) == set()
    while run.weights.builds[dial] < 2:
        run.step((dial, 8))


def test_the_number_of_remembered_savings_is_bounded() -> None:
    run = PlannerRun(capacity=1)
    for index in range(REMEMBERED + 50):
        run.step((Dial(index / 4096 + 0.1), 1))
    assert len(run.planner._savings) == REMEMBERED


def test_the_oldest_savings_are_forgotten_first() -> None:
    run = PlannerRun(capacity=1)
    first, kept = Dial(0.01), Dial(0.02)
    run.step((first, 1))
    for index in range(REMEMBERED):
        run.step((Dial(index / 4096 + 0.1), 1))
        if index % 500 == 0:
            run.step((kept, 1))
    assert kept in run.planner._savings
    assert first not in run.planner._savings
