"""A step of decodes takes the right graph, and its replay computes what the forward computes.

Here a replay runs the forward again over the same buffers, which a CUDA graph does in one launch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.engine import Engine
from mi_runtime.execution.decode_graphs import SIZES, DecodeGraphs, GraphKey, sizes_for
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.row_lambdas import BlendGroups, StepRows, Way
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch
from mi_runtime.scheduling.sequence import Sequence
from tests.runtime.execution.test_ways import Subject, make_subject
from tests.runtime.ways import RandomPlanner

PairOf = Callable[..., tuple[Path, Path]]
FAMILIES = ("qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "starcoder2")
E, B, P = Way.ENDPOINT, Way.BLENDED, Way.PAIR


class RunAgain:
    """Captures a forward as a function that runs it again, and counts the replays."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            self.replays += 1
            return run()

        return replay


def replays(graphs: DecodeGraphs) -> int:
    assert isinstance(graphs._capture, RunAgain)
    return graphs._capture.replays


def capture(
    engine: Engine, places: int = 2, sizes: tuple[int, ...] = (2, 4, 8), **settings: Any
) -> DecodeGraphs:
    """Captures the engine's decodes, which it then replays."""
    runner, engine._groups.cache = engine._runner, BlendCache(places)
    runner.graphs = DecodeGraphs(
        runner._model, runner.attention, RunAgain(), sizes=sizes, max_blocks=16, **settings
    )
    runner.graphs.capture()
    return runner.graphs


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest, pair_of: PairOf) -> Subject:
    return make_subject(pair_of(request.param))


# --- What a replay computes -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_greedy_tokens_are_those_of_the_merged_checkpoints(subject: Subject, seed: int) -> None:
    graphs = capture(subject.engine)
    subject.engine._runner.planner = RandomPlanner(seed)  # type: ignore[assignment]
    subject.check_answers()
    assert replays(graphs) > 5


@pytest.mark.parametrize("policy", ["auto", "pair", "blended"])
def test_greedy_tokens_are_replayed_correctly_under_every_policy(
    pair_of: PairOf, policy: str
) -> None:
    subject = make_subject(pair_of("qwen3"), blend_policy=policy)
    graphs = capture(subject.engine)
    subject.check_answers()
    subject.check_answers()
    assert replays(graphs)


def test_every_way_is_replayed_and_counted(subject: Subject) -> None:
    engine, taken = subject.engine, []
    graphs = capture(engine)
    engine._runner.planner = ByDial()  # type: ignore[assignment]
    choose = graphs.key_for
    graphs.key_for = lambda sub_batch: taken.append(choose(sub_batch)) or taken[-1]  # type: ignore[method-assign,func-returns-value]
    before = dict(engine._groups.executions)
    subject.check_answers()
    assert {key.way for key in taken if key is not None} == set(Way)
    counted = {way: count - before[way] for way, count in engine._groups.executions.items()}
    assert sum(counted.values()) == len(taken) * len(engine._groups.names)


class ByDial:
    """Plans each dial alone in three steps of four, and all together in the fourth."""

    def __init__(self) -> None:
        self._step = 0

    def plan(self, chunks: list[Chunk]) -> list[SubBatch]:
        self._step += 1
        if self._step % 4 == 0:
            return [SubBatch(chunks, blended=False)]
        dials = dict.fromkeys(chunk.dial for chunk in chunks)
        return [SubBatch([one for one in chunks if one.dial == dial], True) for dial in dials]


MIXED = (
    Dial(0.5, (("0.attn", 0.0), ("1.mlp", 1.0), ("head", 0.7))),
    Dial(0.0, (("1.attn", 0.3),)),
    Dial(1.0),
    Dial(0.5),
)


def answers(engine: Engine, dials: tuple[Dial, ...] = MIXED) -> dict[str, list[int | None]]:
    sampling = SamplingParams(max_tokens=9, temperature=0.8, seed=3, ignore_eos=True)
    prompt = (5, 6, 7, 8, 9)
    requests = [
        EngineRequest(str(order), prompt[: 2 + order % 3], dial, sampling)
        for order, dial in enumerate(dials)
    ]
    events = engine.generate(requests)
    return {name: [event.token_id for event in own] for name, own in events.items()}


def test_dials_with_a_λ_for_each_group_are_replayed_too(pair_of: PairOf) -> None:
    engine = make_subject(pair_of("qwen3"), prefix_caching=False).engine
    expected = answers(engine)
    graphs = capture(engine)
    assert answers(engine) == expected
    assert replays(graphs)
    assert answers(engine, MIXED[:1]) == {"0": expected["0"]}


def test_padding_rows_write_to_the_null_block_only(pair_of: PairOf) -> None:
    """After a larger step, a smaller one writes its own slot in each layer, and the null block."""
    engine = make_subject(pair_of("qwen3"), prefix_caching=False).engine
    graphs = capture(engine)
    answers(engine)
    attention, model = engine._runner.attention, engine._runner._model
    before = [keys.clone() for keys in attention._keys]
    sequence = Sequence(EngineRequest("one", (4, 5), Dial(0.5), SamplingParams()))
    sequence.block_table, sequence.computed = [3], 1
    sub_batch = SubBatch([Chunk(sequence, 1, 1)], blended=False)
    with torch.inference_mode():
        engine._runner._forward(sub_batch, None, {})
    changed = [
        (keys != old).any(dim=(1, 2, 3)).nonzero().flatten().tolist()
        for keys, old in zip(attention._keys, before, strict=True)
    ]
    assert graphs.key_for(sub_batch) == GraphKey(2, P)
    assert all(3 in blocks and set(blocks) <= {3, attention.null_block} for blocks in changed)
    assert len(changed) == len(model.layers)


# --- Which graph a step takes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, (2,)), (2, (2,)), (3, (2, 3)), (256, SIZES[:12]), (512, SIZES), (9999, SIZES)],
)
def test_there_are_graphs_for_every_number_of_rows(rows: int, sizes: tuple[int, ...]) -> None:
    assert sizes_for(rows) == sizes


@pytest.mark.parametrize(
    ("rows", "wanted", "sizes"),
    [
        (256, (1, 32, 128), (2, 32, 128)),
        (256, (1, 2, 3), (2, 3)),
        (20, (8, 32, 128), (8, 20)),
        (32, (8, 100_000), (8, 32)),
        (8, (8, 32, 128), (8,)),
        (1, (1,), (2,)),
    ],
)
def test_configured_sizes_are_cut_to_the_rows_that_a_step_may_have(
    rows: int, wanted: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    assert sizes_for(rows, wanted) == sizes


def test_a_step_larger_than_any_graph_is_not_replayed(pair_of: PairOf) -> None:
    """Three rows fit a graph, so that steps of four run without one."""
    engine = make_subject(pair_of("qwen3"), prefix_caching=False).engine
    expected = answers(engine)
    graphs, taken = capture(engine, sizes=(3,)), set()
    choose = graphs.key_for

    def graph_of(sub_batch: SubBatch) -> GraphKey | None:
        taken.add(choose(sub_batch))
        return choose(sub_batch)

    graphs.key_for = graph_of  # type: ignore[method-assign]
    assert answers(engine) == expected
    assert answers(engine, MIXED[:3]) == {name: expected[name] for name in "012"}
    assert taken == {None, GraphKey(3, P)}


def test_the_λ_of_captured_rows_are_aligned_to_16_bytes(pair_of: PairOf) -> None:
    graphs = capture(make_subject(pair_of("qwen3")).engine, sizes=(2, 5))
    held = [rows.lambdas for key in graphs.keys for rows in graphs._rows[key].values()]
    of_endpoints = graphs._shared.data_ptr()
    addresses = {one.data_ptr() for one in held} - {of_endpoints, of_endpoints + 4}  # never read
    assert addresses
    assert not [address for address in addresses if address % 16]


@pytest.fixture
def graphs(pair_of: PairOf) -> DecodeGraphs:
    return capture(make_subject(pair_of("qwen3")).engine)


def decode(dial: Dial, known: int = 5, computed: int = 4, **sampling: Any) -> Chunk:
    request = EngineRequest("r", tuple(range(3, 3 + known)), dial, SamplingParams(**sampling))
    sequence = Sequence(request)
    sequence.computed = computed
    return Chunk(sequence, computed, 1)


@pytest.mark.parametrize(
    ("dials", "key"),
    [
        ([Dial(0.0)], GraphKey(2, E, 0)),
        ([Dial(1.0)] * 3, GraphKey(4, E, 1)),
        ([Dial(0.0), Dial(1.0)], GraphKey(2, P)),
        ([Dial(0.5)], GraphKey(2, P)),
        ([Dial(0.5), Dial(0.6)] * 4, GraphKey(8, P)),
        ([Dial(0.0, (("head", 0.5),))], GraphKey(2, P)),
        ([Dial(0.5)] * 9, None),
    ],
)
def test_a_step_takes_the_smallest_graph_of_its_way_that_fits(
    graphs: DecodeGraphs, dials: list[Dial], key: GraphKey | None
) -> None:
    assert graphs.key_for(SubBatch([decode(dial) for dial in dials], blended=False)) == key


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(decode(Dial(0.5), computed=3).sequence, 3, 2),
        decode(Dial(0.5), computed=3),  # one token of a prompt that is not complete
        decode(Dial(0.5), known=2, computed=0, prompt_logprobs=1),
    ],
)
def test_prefills_and_scored_rows_are_not_replayed(graphs: DecodeGraphs, chunk: Chunk) -> None:
    assert graphs.key_for(SubBatch([chunk], blended=False)) is None


def test_blended_decodes_are_replayed_if_all_their_blends_have_one_place(
    graphs: DecodeGraphs,
) -> None:
    groups: BlendGroups = graphs._groups
    low, high = (SubBatch([decode(Dial(value))], blended=True) for value in (0.2, 0.4))
    assert graphs.key_for(low) is None
    for value in (0.2, 0.4):
        groups.begin(StepRows((Dial(value),), (0,), (0,), blended=True))
        zero = torch.zeros(1, dtype=torch.int64)
        assert graphs.key_for(low if value == 0.2 else high) is None  # nothing is built yet
        graphs._attention.begin(graphs._plan(1))
        graphs._model.logits(zero, zero, zero, graphs._attention)
    assert (graphs.key_for(low), graphs.key_for(high)) == (GraphKey(2, B, 0), GraphKey(2, B, 1))
    groups.cache.use(("1.mlp", 0.6))  # in the place of 0.2
    assert graphs.key_for(low) is None


def test_capturing_leaves_the_blend_cache_empty_but_keeps_its_memory(pair_of: PairOf) -> None:
    engine = make_subject(pair_of("qwen3")).engine
    capture(engine)
    cache = engine._groups.cache
    assert (cache.builds, cache.hits, cache.evictions) == (0, 0, 0)
    assert cache.missing([(name, 0.25) for name in engine._groups.names]) == 6 + 2
    assert cache.nbytes > 0


def test_captured_attention_covers_the_longest_sequence(
    graphs: DecodeGraphs,
) -> None:
    plan, attention = graphs._plan(4), graphs._attention
    assert isinstance(attention, PagedAttention)
    assert (plan.decodes, plan.longest_query, plan.longest) == (4, 1, 16 * attention.block_size)
    assert plan.by_rows[3].shape == (4, 16)
