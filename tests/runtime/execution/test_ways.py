"""All three ways compute what the merged checkpoint computes, even if an engine mixes them.

The oracle is plain `transformers` on a checkpoint merged offline in fp32; at λ = 0 and 1 it is the
endpoint as it is on disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_runtime.attention.reference import PackedAttention
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.execution.cost_measurement import blend_bytes
from mi_runtime.model.row_lambdas import StepRows, Way
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.planner import CostCurve, CostModel
from tests.runtime import oracle
from tests.runtime.engine_runs import run_to_end
from tests.runtime.families import FAMILIES, VOCABULARY, marks_of
from tests.runtime.shared_models import engine_of
from tests.runtime.ways import RandomPlanner

Directories = tuple[Path, Path]
PairOf = Callable[..., Directories]

LAMBDAS = (0.0, 0.11, 0.5, 0.93, 1.0)
TOLERANCE = 1e-4  # max |Δlogit| in fp32
LENGTHS = (9, 14)  # of two sequences in one forward; longer than the families' windows
NEW_TOKENS = 7


@dataclass
class Subject:
    """An engine of a family, and its oracle for each λ."""

    directories: Directories
    engine: Engine

    def oracle(self, value: float) -> Any:
        if value in (0.0, 1.0):
            return oracle.endpoint(self.directories[int(value)])
        return oracle.merged(*self.directories, value)

    def check_answers(self) -> None:
        """Checks tokens and log-probabilities of all answers against the oracle's.

        A token alone may be right by luck.
        """
        for name, events in run_to_end(self.engine, *requests()).items():
            value, prompt = PROMPTS[name]
            tokens = [event.token_id for event in events if event.token_id is not None]
            assert len(tokens) == NEW_TOKENS
            expected = oracle.assert_greedy(self.oracle(value), prompt, tokens).log_softmax(1)
            tops = [dict(event.logprobs.top) for event in events if event.logprobs is not None]
            shown = torch.tensor([[top[token] for token in range(VOCABULARY)] for top in tops])
            assert (shown - expected).abs().max() < TOLERANCE

    def logits(self, dials: tuple[Dial, Dial], blended: bool) -> list[Tensor]:
        """Returns the logits of two sequences in one forward, each `[tokens, vocabulary]`."""
        model, total = self.engine._runner._model, sum(LENGTHS)
        distinct = tuple(dict.fromkeys(dials))
        index = [distinct.index(dial) for dial in dials]
        of_row = tuple(
            one for one, length in zip(index, LENGTHS, strict=True) for _ in range(length)
        )
        model.groups.begin(StepRows(distinct, of_row, tuple(range(total)), blended))
        ids = torch.tensor([token for tokens in SEQUENCES for token in tokens])
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        out = model.logits(ids, positions, torch.arange(total), PackedAttention(LENGTHS))
        return list(out.split(LENGTHS))

    def expected(self, values: tuple[float, float]) -> list[Tensor]:
        pairs = zip(values, SEQUENCES, strict=True)
        return [oracle.logits(self.oracle(value), tokens) for value, tokens in pairs]

    def executions(self) -> dict[Way, int]:
        return dict(self.engine._groups.executions)


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
    return tokens


SEQUENCES = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
PROMPTS = {  # several requests of one λ, so that they can share a forward
    f"{value}-{index}": (value, random_tokens(5 + 4 * index + order, 10 * index + order))
    for order, value in enumerate(LAMBDAS)
    for index in range(2)
}


def make_subject(directories: Directories, **settings: Any) -> Subject:
    small = {
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 96,
        "block_size": 4,
        "max_batched_tokens": 13,
        "max_model_len": 64,
        "blend_cache_bytes": 1 << 28,
    }
    return Subject(directories, engine_of(EngineConfig(*map(str, directories), **small | settings)))


@pytest.fixture(params=FAMILIES)
def any_subject(request: pytest.FixtureRequest, pair_of: PairOf) -> Subject:
    return make_subject(pair_of(request.param))


@pytest.fixture(params=[pytest.param(one, marks=marks_of(one)) for one in FAMILIES])
def subject(request: pytest.FixtureRequest, pair_of: PairOf) -> Subject:
    return make_subject(pair_of(request.param))


def requests() -> list[EngineRequest]:
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=VOCABULARY
    )
    return [
        EngineRequest(name, tuple(prompt), Dial(value), sampling)
        for name, (value, prompt) in PROMPTS.items()
    ]


# --- Logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.11, 1.0])
def test_the_logits_of_all_ways_are_those_of_the_merged_checkpoint(
    any_subject: Subject, value: float
) -> None:
    """All rows are at λ, by blended weights and by pair product; then only half of them are.

    An endpoint takes its own weights instead of blended ones.
    """
    subject, dial = any_subject, Dial(value)
    expected = subject.expected((value, value))
    before = subject.executions()
    blended = subject.logits((dial, dial), blended=True)
    alone = subject.logits((dial, dial), blended=False)
    mixed = [
        subject.logits((dial, Dial(0.37)), blended=False)[0],
        subject.logits((Dial(0.37), dial), blended=True)[1],
    ]
    taken = {way for way, count in subject.executions().items() if count > before[way]}
    is_endpoint = value in (0.0, 1.0)
    assert taken == ({Way.ENDPOINT, Way.PAIR} if is_endpoint else {Way.BLENDED, Way.PAIR})
    for way in (blended, alone, mixed):
        for logits, wanted in zip(way, expected, strict=True):
            assert (logits - wanted).abs().max() < TOLERANCE


def test_both_endpoints_in_one_forward_give_their_own_logits(subject: Subject) -> None:
    logits = subject.logits((Dial(1.0), Dial(0.0)), blended=True)
    for own, wanted in zip(logits, subject.expected((1.0, 0.0)), strict=True):
        assert (own - wanted).abs().max() < TOLERANCE


# --- Greedy tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))]
)
def test_greedy_tokens_stay_the_same_when_ways_switch_at_random(
    subject: Subject, seed: int
) -> None:
    """The steps mix decodes and chunked prefills, in one forward or several."""
    before, planner = subject.executions(), RandomPlanner(seed)
    subject.engine._runner.planner = planner  # type: ignore[assignment]
    subject.check_answers()
    assert planner.parts > planner.steps
    taken = subject.executions()
    assert all(taken[way] > before[way] for way in Way)


def test_greedy_tokens_stay_the_same_when_another_way_wrote_the_cached_kv(subject: Subject) -> None:
    """The prefix cache returns KV that other ways wrote."""
    subject.engine._runner.planner = RandomPlanner(4)  # type: ignore[assignment]
    subject.check_answers()
    hits = subject.engine.stats().prefix_hit_tokens
    subject.check_answers()
    assert subject.engine.stats().prefix_hit_tokens > hits


@pytest.mark.parametrize("policy", ["auto", "pair", "blended"])
def test_every_policy_gives_the_same_tokens(pair_of: PairOf, policy: str) -> None:
    subject = make_subject(pair_of("qwen3"), blend_policy=policy)
    subject.check_answers()
    subject.check_answers()
    stats = subject.engine.stats()
    if policy == "pair":
        assert (stats.blended_executions, stats.blend_builds, stats.blend_bytes) == (0, 0, 0)
    if policy == "blended":
        assert stats.blended_executions


# --- Small budgets and few blocks ---------------------------------------------------------------


@pytest.mark.parametrize("places", [0, 1, 2])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_evictions_during_a_run_do_not_change_the_tokens(
    pair_of: PairOf, family: str, places: int
) -> None:
    """Three λ are blended, and the cache holds fewer."""
    subject = make_subject(pair_of(family))
    cache, one_blend = subject.engine._groups.cache, blend_bytes(subject.engine._runner._model)
    cache.places = places
    subject.engine._runner.planner = RandomPlanner(5)  # type: ignore[assignment]
    subject.check_answers()
    stats = subject.engine.stats()
    assert stats.blend_evictions
    assert stats.blend_builds > len(subject.engine._groups.names) * 3
    assert stats.blend_bytes <= max(1, places) * one_blend * 1.05  # routers come on top
    cache.check_integrity()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_between_ways_does_not_change_the_tokens(
    pair_of: PairOf, prefix_caching: bool
) -> None:
    subject = make_subject(pair_of("qwen3"), num_blocks=16, prefix_caching=prefix_caching)
    subject.engine._runner.planner = RandomPlanner(6)  # type: ignore[assignment]
    subject.check_answers()
    assert subject.engine.stats().preemptions


def test_a_hot_λ_is_computed_by_blended_weights_after_a_while(pair_of: PairOf) -> None:
    """The costs are made up, as measured ones differ by machine."""
    subject, dial = make_subject(pair_of("qwen3")), Dial(0.5)
    engine, groups = subject.engine, subject.engine._groups
    blended, pair = CostCurve((1, 2), (1.0, 1.0)), CostCurve((1, 2), (2.0, 2.0))
    engine._runner.planner.costs = CostModel(1.0, 1.0, blended, pair, build=9.5)
    greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    before = subject.executions()
    engine.generate([EngineRequest("r", (5, 6, 7), dial, greedy)])
    taken = {way: count - before[way] for way, count in subject.executions().items()}
    steps = {way: count / len(groups.names) for way, count in taken.items()}
    assert steps == {Way.ENDPOINT: 0, Way.PAIR: 9, Way.BLENDED: 11}
    stats = engine.stats()
    assert (stats.blend_builds, stats.blend_evictions) == (len(groups.names), 0)
    assert stats.blend_bytes == blend_bytes(engine._runner._model)
