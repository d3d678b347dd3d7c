"""Each blend group runs at its own λ, and the answer may have another dial than the reasoning.

The oracles share nothing with the engine but the names of the blend groups: plain `transformers`
on weights merged offline in fp32, group by group. For an answer with its own dial, two merged
models run in turn over one `DynamicCache`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.model.row_lambdas import Way
from mi_runtime.model.swap import group_of
from mi_runtime.request import Dial, EngineRequest, SamplingParams, ThinkPolicy, TokenEvent
from mi_runtime.scheduling.block_pool import BlockPool
from mi_runtime.scheduling.scheduler import Scheduler
from mi_runtime.scheduling.sequence import Sequence
from tests.runtime import oracle
from tests.runtime.engine_runs import run_to_end, tokens_of
from tests.runtime.families import SMALL, VOCABULARY
from tests.runtime.shared_models import engine_of
from tests.runtime.ways import RandomPlanner

Directories = tuple[Path, Path]
PairOf = Callable[..., Directories]

FAMILIES = ("qwen3", "gemma3_text", "gpt_oss", "starcoder2")
GROUPS = (
    "embed",
    *(f"{layer}.{part}" for layer in range(SMALL["num_hidden_layers"]) for part in ("attn", "mlp")),
    "head",
)
TOLERANCE = 1e-4  # max |Δlogprob| in fp32
NEW_TOKENS = 8
OPEN, CLOSE = 90, 91


# --- Oracles ------------------------------------------------------------------------------------


@cache
def merged(directories: Directories, dial: Dial) -> Any:
    """Returns a plain model with an untied head, whose groups are merged each at its own λ."""
    low, high = (oracle.endpoint(directory).state_dict() for directory in directories)
    model = AutoModelForCausalLM.from_pretrained(
        directories[0], dtype=torch.float32, attn_implementation="eager"
    )
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    blend = {
        name: torch.lerp(tensor, high[name], dial.value_of(group_of(name)))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in low.items()
    }
    model.load_state_dict(blend)
    return model.eval().requires_grad_(False)


@dataclass
class ReferenceRun:
    """Runs one request with the model of each token's dial, over one cache."""

    request: EngineRequest
    output: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)  # [vocabulary], of each token
    switch: int | None = None  # position of the first token under the answer's dial

    @torch.inference_mode()
    def run(self, directories: Directories) -> "ReferenceRun":
        request, forced = self.request, list[int]()
        tokens, computed = list(request.prompt), 0
        model = merged(directories, request.dial)
        kv = DynamicCache(config=model.config)
        while True:
            ids = torch.tensor([tokens[computed:]])
            positions = torch.arange(computed, len(tokens)).unsqueeze(0)
            logits = model(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                **{oracle.name_of_cache(model): kv},
            ).logits[0, -1]
            computed = len(tokens)
            self.logprobs.append(logits.log_softmax(0))
            token = forced.pop(0) if forced else int(logits.argmax())
            tokens.append(token)
            self.output.append(token)
            if len(self.output) == request.sampling.max_tokens:
                return self
            if self.switch is not None:
                continue
            if self._closes(token):
                self.switch = len(tokens) - 1
                model = merged(directories, request.answer_dial or request.dial)
            elif request.think is not None and self._reasoning == request.think.cap:
                forced = forced or list(request.think.closing)

    @property
    def _reasoning(self) -> int:
        return len(self.output)

    def _closes(self, token: int) -> bool:
        think = self.request.think
        return think is not None and (token == think.close_id or token in think.close_aliases)


@cache
def reference_run(request: EngineRequest, directories: Directories) -> ReferenceRun:
    """Returns the run whose tokens the engine must give."""
    return ReferenceRun(request).run(directories)


# --- Engines ------------------------------------------------------------------------------------


def make_engine(directories: Directories, **settings: Any) -> Engine:
    small = {
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 96,
        "block_size": 4,
        "max_model_len": 64,
        "blend_cache_bytes": 1 << 28,
    }
    return engine_of(EngineConfig(*map(str, directories), **small | settings))


def check_logprobs(events: list[TokenEvent], expected: list[Tensor]) -> None:
    for event, wanted in zip(events, expected, strict=True):
        assert event.logprobs is not None
        top = dict(event.logprobs.top)
        shown = torch.tensor([top[token] for token in range(VOCABULARY)])
        assert (shown - wanted).abs().max() < TOLERANCE


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, OPEN, (length,), generator=generator).tolist())


def greedy(max_tokens: int = NEW_TOKENS) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=VOCABULARY
    )


# --- A λ for each group -------------------------------------------------------------------------

MIXED = {
    "one λ": Dial(0.5),
    "attention": Dial.on_grid(0.2, 0.01, {f"{layer}.attn": 0.9 for layer in range(3)}),
    "mlp of a range": Dial.on_grid(0.7, 0.01, {"0.mlp": 0.0, "1.mlp": 0.31}),
    "embedding": Dial.on_grid(0.0, 0.01, {"embed": 1.0}),
    "head": Dial.on_grid(1.0, 0.01, {"head": 0.4}),
    "embedding and head": Dial.on_grid(0.5, 0.01, {"embed": 0.1, "head": 0.8}),
    "last layer": Dial.on_grid(0.0, 0.01, {"2.attn": 1.0, "2.mlp": 1.0}),
    "all different": Dial.on_grid(
        0.0, 0.01, {name: (index + 1) / 10 for index, name in enumerate(GROUPS)}
    ),
}


def requests_at(dials: dict[str, Dial]) -> list[EngineRequest]:
    return [
        EngineRequest(name, prompt(6 + 2 * seed, seed), dial, greedy())
        for seed, (name, dial) in enumerate(dials.items())
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def directories(request: pytest.FixtureRequest, pair_of: PairOf) -> Directories:
    return pair_of(request.param)


def test_group_by_group_a_mixed_batch_agrees_with_offline_merges(directories: Directories) -> None:
    engine = make_engine(directories, max_batched_tokens=17)
    requests = requests_at(MIXED)
    events = run_to_end(engine, *requests)
    for request in requests:
        own = events[request.request_id]
        model = merged(directories, request.dial)
        answer = tokens_of(own)
        assert len(answer) == NEW_TOKENS
        logits = oracle.assert_greedy(model, list(request.prompt), answer)
        check_logprobs(own, list(logits.log_softmax(1)))


@pytest.mark.parametrize("name", MIXED)
def test_a_request_alone_takes_the_expected_way_for_each_group(pair_of: PairOf, name: str) -> None:
    directories, request = pair_of("qwen3"), requests_at(MIXED)[list(MIXED).index(name)]
    expected = oracle.greedy(merged(directories, request.dial), list(request.prompt), NEW_TOKENS)
    taken = {}
    for policy in ("pair", "blended"):
        engine = make_engine(directories, blend_policy=policy)
        before = dict(engine._groups.executions)
        assert tokens_of(run_to_end(engine, request)[name]) == expected
        after = engine._groups.executions
        taken[policy] = {way: (after[way] - before[way]) // NEW_TOKENS for way in Way}
    endpoints = sum(request.dial.value_of(group) in (0.0, 1.0) for group in GROUPS)
    rest = len(GROUPS) - endpoints
    assert taken["pair"] == {Way.ENDPOINT: endpoints, Way.PAIR: rest, Way.BLENDED: 0}
    assert taken["blended"] == {Way.ENDPOINT: endpoints, Way.PAIR: 0, Way.BLENDED: rest}


def test_switching_ways_at_random_gives_the_same_tokens(directories: Directories) -> None:
    engine = make_engine(directories, max_batched_tokens=17)
    engine._runner.planner = RandomPlanner(0)  # type: ignore[assignment]
    requests = requests_at(MIXED)
    events = run_to_end(engine, *requests)
    for request in requests:
        model, answer = merged(directories, request.dial), tokens_of(events[request.request_id])
        assert len(answer) == NEW_TOKENS
        oracle.assert_greedy(model, list(request.prompt), answer)


# --- The prefix cache ---------------------------------------------------------------------------

BASES = (0.0, 0.3, 1.0)
SHIFTS = (0.31, 0.5)


@pytest.fixture
def caching_engine(pair_of: PairOf) -> Engine:
    return make_engine(pair_of("qwen3"), num_blocks=256)


def cached_tokens(engine: Engine, dial: Dial, salt: str) -> int:
    request = EngineRequest("r", prompt(17, 1), dial, greedy(1), cache_salt=salt)
    return run_to_end(engine, request)["r"][0].cached_tokens


@pytest.mark.parametrize("group", GROUPS)
def test_dials_that_differ_in_one_group_share_no_kv(caching_engine: Engine, group: str) -> None:
    dials = [Dial(base) for base in BASES]
    dials += [Dial.on_grid(base, 0.01, {group: shift}) for base in BASES for shift in SHIFTS]
    assert len(set(dials)) == len(dials)
    assert [cached_tokens(caching_engine, dial, group) for dial in dials] == [0] * len(dials)
    assert [cached_tokens(caching_engine, dial, group) for dial in dials] == [16] * len(dials)


def test_the_same_λ_in_two_different_groups_shares_no_kv(caching_engine: Engine) -> None:
    dials = [Dial.on_grid(0.3, 0.01, {group: 0.5}) for group in GROUPS]
    assert [cached_tokens(caching_engine, dial, "two") for dial in dials] == [0] * len(dials)


EQUAL = {
    "another order": (
        Dial.on_grid(0.3, 0.01, {"head": 0.5, "0.mlp": 0.1}),
        Dial.on_grid(0.3, 0.01, {"0.mlp": 0.1, "head": 0.5}),
    ),
    "rounded to the grid": (
        Dial.on_grid(0.3, 0.01, {"head": 0.5}),
        Dial.on_grid(0.2999, 0.01, {"head": 0.50004}),
    ),
    "groups equal to the default": (
        Dial.on_grid(0.3, 0.01),
        Dial.on_grid(0.3, 0.01, dict.fromkeys(GROUPS, 0.3)),
    ),
    "equal once rounded": (
        Dial.on_grid(0.3, 0.01),
        Dial.on_grid(0.302, 0.01, {"1.attn": 0.298}),
    ),
    "a negative zero": (Dial.on_grid(0.0, 0.01), Dial.on_grid(-0.0, 0.01, {"head": -0.0})),
    "integers": (Dial.on_grid(1.0, 0.01, {"head": 0.0}), Dial.on_grid(1, 0.01, {"head": 0})),
}


@pytest.mark.parametrize("form", EQUAL)
def test_equal_dials_in_different_forms_share_kv(caching_engine: Engine, form: str) -> None:
    one, other = EQUAL[form]
    assert one == other
    assert repr(one) == repr(other)  # the root key of the prefix cache is made of it
    assert cached_tokens(caching_engine, one, form) == 0
    assert cached_tokens(caching_engine, other, form) == 16


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_λ_outside_the_range_is_refused_in_any_group(bad: float) -> None:
    with pytest.raises(ValueError, match="λ must be"):
        Dial.on_grid(bad, 0.01)
    with pytest.raises(ValueError, match="λ must be"):
        Dial.on_grid(0.5, 0.01, {"head": bad})


# --- A dial for the answer ----------------------------------------------------------------------

REASONING, ANSWER = Dial(0.8), Dial.on_grid(0.1, 0.01, {"head": 0.3, "1.mlp": 1.0})
CAP = 5
LONG_ANSWER = 16  # tokens of an answer with its reasoning


def forced_close(closing: tuple[int, ...] = ()) -> ThinkPolicy:
    return ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=CAP, closing=closing)


def switching_request(
    name: str,
    think: ThinkPolicy,
    *,
    length: int = 9,
    seed: int = 0,
    dials: tuple[Dial, Dial] = (REASONING, ANSWER),
) -> EngineRequest:
    tokens = prompt(length, seed)
    return EngineRequest(name, tokens, dials[0], greedy(LONG_ANSWER), think, answer_dial=dials[1])


def natural_close(directories: Directories, seed: int, after: int) -> ThinkPolicy:
    """Returns a policy whose closing tag the model writes by itself after `after` tokens."""
    plain = EngineRequest("r", prompt(9 + seed, seed), REASONING, greedy(LONG_ANSWER))
    output = reference_run(plain, directories).output
    close = next(
        token for at, token in enumerate(output) if at >= after and token not in output[:at]
    )
    return ThinkPolicy(OPEN, close, opened_by_prompt=True)


def by_alias(think: ThinkPolicy) -> ThinkPolicy:
    """Returns a policy in which the same token closes the block as an alias."""
    aliases = frozenset({think.close_id})
    return ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, close_aliases=aliases)


def all_closes(directories: Directories) -> list[EngineRequest]:
    """Returns requests that close their block in every manner, at different places of KV blocks."""
    own = natural_close(directories, seed=1, after=3)
    alias = by_alias(natural_close(directories, seed=2, after=4))
    return [
        switching_request("own tag", own, length=10, seed=1),
        switching_request("alias", alias, length=11, seed=2),
        switching_request("forced", forced_close(), length=7, seed=3),
        switching_request("forced sequence", forced_close((70, CLOSE, 71)), length=12, seed=4),
        switching_request("to an endpoint", forced_close(), seed=5, dials=(Dial(0.5), Dial(0.0))),
        switching_request("from an endpoint", forced_close(), seed=6, dials=(Dial(1.0), Dial(0.2))),
        switching_request("to the same dial", forced_close(), seed=7, dials=(Dial(0.5), Dial(0.5))),
        EngineRequest("no switch", prompt(9, 8), Dial(0.4), greedy(LONG_ANSWER), forced_close()),
    ]


def check_against_reference(
    engine: Engine, directories: Directories, requests: list[EngineRequest]
) -> dict[str, ReferenceRun]:
    events = run_to_end(engine, *requests)
    runs = {request.request_id: reference_run(request, directories) for request in requests}
    answers = {name: tokens_of(own) for name, own in events.items()}
    assert answers == {name: run.output for name, run in runs.items()}
    assert all(run.switch is not None for run in runs.values())
    for name, run in runs.items():
        check_logprobs(events[name], run.logprobs)
    return runs


def test_the_answer_is_that_of_two_merged_models_over_one_cache(directories: Directories) -> None:
    engine = make_engine(directories)
    check_against_reference(engine, directories, all_closes(directories))
    assert not engine.stats().preemptions


def test_a_switch_one_token_early_or_late_would_change_the_tokens(pair_of: PairOf) -> None:
    """Shows that the test above would fail then."""
    directories = pair_of("qwen3")
    request = switching_request("r", forced_close((70, CLOSE, 71)), length=12, seed=4)
    at_close = reference_run(request, directories).output
    for closes_at in (70, 71):
        moved = ThinkPolicy(
            OPEN, closes_at, opened_by_prompt=True, cap=CAP, closing=(70, CLOSE, 71)
        )
        run = reference_run(switching_request("r", moved, length=12, seed=4), directories)
        assert run.output != at_close


def test_a_closing_tag_in_the_prompt_or_outside_a_block_does_not_switch(pair_of: PairOf) -> None:
    """It is a token like any other."""
    directories = pair_of("qwen3")
    think = ThinkPolicy(OPEN, CLOSE, opened_by_prompt=False)
    request = EngineRequest(
        "r", (5, CLOSE, 6), REASONING, greedy(LONG_ANSWER), think, answer_dial=ANSWER
    )
    plain = EngineRequest("r", (5, CLOSE, 6), REASONING, greedy(LONG_ANSWER))
    answer = tokens_of(run_to_end(make_engine(directories), request)["r"])
    assert answer == reference_run(plain, directories).output


@pytest.mark.parametrize("budget", [1, 3, 17])
def test_switching_does_not_depend_on_chunked_prefill(pair_of: PairOf, budget: int) -> None:
    directories = pair_of("qwen3")
    engine = make_engine(directories, max_batched_tokens=budget)
    requests = all_closes(directories)[:4]
    check_against_reference(engine, directories, requests)


@pytest.mark.parametrize(
    ("family", "prefix_caching", "budget", "num_blocks"),
    [
        ("qwen3", True, 5, 11),
        ("qwen3", False, 17, 9),
        ("gpt_oss", True, 64, 16),
        pytest.param("qwen3", True, 64, 16, marks=pytest.mark.long),
        pytest.param("gpt_oss", False, 5, 11, marks=pytest.mark.long),
        pytest.param("gpt_oss", True, 17, 9, marks=pytest.mark.long),
    ],
)
def test_recomputing_after_preemption_takes_each_positions_own_dial(
    pair_of: PairOf, family: str, prefix_caching: bool, budget: int, num_blocks: int
) -> None:
    directories = pair_of(family)
    engine = make_engine(
        directories,
        num_blocks=num_blocks,
        prefix_caching=prefix_caching,
        max_batched_tokens=budget,
    )
    preempted_after_switch = []
    preempt = engine.scheduler._preempt

    def record(sequence: Any) -> None:
        preempted_after_switch.append(sequence.switch_at is not None)
        preempt(sequence)

    engine.scheduler._preempt = record  # type: ignore[method-assign]
    check_against_reference(engine, directories, all_closes(directories))
    assert any(preempted_after_switch)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]
)
def test_switching_does_not_depend_on_the_ways(directories: Directories, seed: int) -> None:
    engine = make_engine(directories, num_blocks=20, max_batched_tokens=11)
    engine._runner.planner = RandomPlanner(seed)  # type: ignore[assignment]
    check_against_reference(engine, directories, all_closes(directories))
    assert engine.stats().preemptions


@pytest.mark.parametrize("length", [7, 8, 9, 10])
def test_the_next_turn_reuses_kv_up_to_the_switch_and_none_after_it(
    pair_of: PairOf, length: int
) -> None:
    """The next turn's prompt contains the first turn, and runs at the reasoning dial.

    Blocks with KV of the answer's dial must not serve it, wherever in a block the switch lies.
    """
    directories = pair_of("qwen3")
    engine = make_engine(directories)
    first = switching_request("first", forced_close(), length=length, seed=length)
    run = check_against_reference(engine, directories, [first])["first"]
    assert run.switch is not None
    after = (*first.prompt, *run.output, 7, 8, 9)
    for name, dials in (("other", (ANSWER, ANSWER)), ("same", (REASONING, ANSWER))):
        turn = EngineRequest(
            name, after, dials[0], greedy(LONG_ANSWER), forced_close(), answer_dial=dials[1]
        )
        cached = run_to_end(engine, turn)[name][0].cached_tokens
        assert cached == (run.switch // 4 * 4 if name == "same" else 0)
    again = EngineRequest(
        "again", after, REASONING, greedy(LONG_ANSWER), forced_close(), answer_dial=ANSWER
    )
    check_against_reference(engine, directories, [again])


def test_the_same_request_again_finds_its_prompt_and_answers_the_same(pair_of: PairOf) -> None:
    directories = pair_of("qwen3")
    engine, requests = make_engine(directories), all_closes(directories)
    check_against_reference(engine, directories, requests)
    hits = engine.stats().prefix_hit_tokens
    check_against_reference(engine, directories, requests)
    full = sum((len(request.prompt) - 1) // 4 * 4 for request in requests)
    assert engine.stats().prefix_hit_tokens - hits == full


def test_two_answer_dials_of_one_reasoning_share_only_the_reasoning(pair_of: PairOf) -> None:
    """Requests are preempted after the switch, and find their own blocks by key."""
    directories = pair_of("qwen3")
    engine = make_engine(directories, num_blocks=16)
    requests = [
        switching_request(str(value), forced_close(), seed=1, dials=(REASONING, Dial(value)))
        for value in (0.0, 0.1, 0.2, 0.8, 0.9, 1.0)
    ]
    runs = check_against_reference(engine, directories, requests)
    assert engine.stats().preemptions
    assert len({tuple(run.output[: CAP + 1]) for run in runs.values()}) == 1
    assert len({tuple(run.output) for run in runs.values()}) > 3


BLOCK = 4
HISTORIES = st.tuples(
    st.sampled_from([Dial(0.2), Dial(0.3)]),
    st.sampled_from([Dial(0.2), Dial(0.4), Dial.on_grid(0.4, 0.01, {"head": 0.5})]),
    st.lists(st.sampled_from([5, CLOSE, CLOSE + 1]), min_size=2 * BLOCK, max_size=3 * BLOCK),
    st.sampled_from([CLOSE, CLOSE + 1]),
)
History = tuple[Dial, Dial, list[int], int]


def keys_and_kv(history: History) -> tuple[list[bytes], list[tuple[tuple[int, Dial], ...]]]:
    """Returns the key of each full block, and the tokens and dials that its KV depends on."""
    dial, answer_dial, output, close = history
    think = ThinkPolicy(OPEN, close, opened_by_prompt=True)
    sequence = Sequence(EngineRequest("r", (7,), dial, think=think, answer_dial=answer_dial))
    for token in output:
        sequence.append(token)
    limits = {"max_model_len": 64, "max_num_seqs": 8, "max_batched_tokens": 64}
    scheduler = Scheduler(BlockPool(64, BLOCK), vocab_size=VOCABULARY, **limits)
    positions = [(token, sequence.dial_at(at)) for at, token in enumerate(sequence.tokens)]
    ends = range(BLOCK, len(sequence) + 1, BLOCK)
    keys = [scheduler._block_key(sequence, end // BLOCK - 1) for end in ends]
    return keys, [tuple(positions[:end]) for end in ends]


@given(one=HISTORIES, other=HISTORIES)
def test_a_key_depends_on_the_token_and_the_dial_of_every_position(
    one: History, other: History
) -> None:
    """Two sequences may have the same tokens and switch at different ones."""
    kv_of: dict[bytes, tuple[tuple[int, Dial], ...]] = {}
    for keys, kv in (keys_and_kv(one), keys_and_kv((*other[:2], one[2], other[3]))):
        for key, computed in zip(keys, kv, strict=True):
            assert kv_of.setdefault(key, computed) == computed
    assert keys_and_kv(one) == keys_and_kv(one)
