"""On a real pair, what a request gets never depends on the requests that run with it."""

import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_runtime.engine import Engine
from mi_runtime.model.pair_modules import PairEmbedding
from mi_runtime.request import (
    Dial,
    EngineRequest,
    FinishReason,
    RequestRejected,
    SamplingParams,
    ThinkPolicy,
    TokenEvent,
)
from tests.runtime import oracle
from tests.runtime.engine_runs import Events, checked_step, run_to_end, tokens_of
from tests.runtime.families import VOCABULARY

Directories = tuple[Path, Path]
MakeEngine = Callable[..., Engine]

LAMBDAS = (0.0, 0.2, 0.2, 0.5, 0.77, 1.0, 1.0, 0.2)
GROUPS = 8  # blend groups of the pair: three layers of two, embedding, head
NEW_TOKENS = 10
BLOCK_SIZE = 4
COMMON = (11, 12, 13, 14, 15, 16, 17, 18, 19)  # two blocks and a bit that prompts share


def request(
    request_id: str = "r",
    prompt: tuple[int, ...] = COMMON,
    value: float = 0.5,
    *,
    salt: str = "",
    think: ThinkPolicy | None = None,
    **params: Any,
) -> EngineRequest:
    greedy = {"temperature": 0, "max_tokens": NEW_TOKENS, **params}
    return EngineRequest(request_id, prompt, Dial(value), SamplingParams(**greedy), think, salt)


def mixed_requests(**params: Any) -> list[EngineRequest]:
    """Returns requests of several λ and lengths, some with a common prefix."""
    generator = random.Random(0)
    own = [tuple(generator.choices(range(3, VOCABULARY), k=1 + 4 * i)) for i in range(len(LAMBDAS))]
    return [
        request(f"r{index}", (*COMMON, *own[index]) if index % 3 else own[index], value, **params)
        for index, value in enumerate(LAMBDAS)
    ]


def first_events(engine: Engine) -> list[TokenEvent]:
    """Runs steps until one has events, and returns them."""
    while not (events := checked_step(engine)):
        pass
    return events


def answer(engine: Engine, one: EngineRequest) -> list[TokenEvent]:
    return run_to_end(engine, one)[one.request_id]


def all_tokens(events: Events) -> dict[str, list[int]]:
    return {request_id: tokens_of(mine) for request_id, mine in events.items()}


def assert_ended_once(events: list[TokenEvent], reason: FinishReason) -> None:
    assert [event.finish_reason for event in events if event.finish_reason] == [reason]
    assert events[-1].finish_reason is reason


@pytest.fixture(scope="module")
def greedy(qwen3_pair: Directories) -> Callable[..., list[int]]:
    """Answers by plain `transformers` on the merged checkpoint: `greedy(prompt, λ)`."""

    @cache
    def answer(prompt: tuple[int, ...] = COMMON, value: float = 0.5) -> list[int]:
        return oracle.greedy(oracle.merged(*qwen3_pair, value), list(prompt), NEW_TOKENS)

    return answer


@pytest.fixture(params=[False, True], ids=["one by one", "ahead"])
def make_engine(make_engine: MakeEngine, request: pytest.FixtureRequest) -> MakeEngine:
    """Runs every test with and without asynchronous scheduling."""
    return partial(make_engine, async_scheduling=request.param)


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


# --- Other requests do not change an answer -----------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batched_tokens": 1},
        {"max_batched_tokens": 7},
        {"num_blocks": 15},
        {"num_blocks": 15, "max_batched_tokens": 5},
        {"block_size": 1, "num_blocks": 256},
        {"block_size": 16},
        {"max_num_seqs": 1},
        {"max_num_seqs": 3},
        {"prefix_caching": False},
        {"prefix_caching": False, "num_blocks": 15},
    ],
    ids=str,
)
def test_greedy_answers_are_the_oracles_under_any_settings(
    settings: dict[str, Any], make_engine: MakeEngine, greedy: Callable[..., list[int]]
) -> None:
    engine, requests = make_engine(**settings), mixed_requests()
    events = run_to_end(engine, *requests)
    for one in requests:
        assert tokens_of(events[one.request_id]) == greedy(one.prompt, one.dial.reasoning_lambda)
        assert_ended_once(events[one.request_id], FinishReason.LENGTH)
    assert (engine.stats().preemptions > 0) == (settings.get("num_blocks") == 15)


def test_answers_from_the_prefix_cache_are_the_same(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    first = run_to_end(engine, *mixed_requests())
    again = run_to_end(engine, *mixed_requests())
    assert all_tokens(first) == all_tokens(again)
    for one in mixed_requests():
        assert tokens_of(again[one.request_id]) == greedy(one.prompt, one.dial.reasoning_lambda)
    assert all(events[0].cached_tokens for events in again.values() if events is not again["r0"])


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in (3, 4, 5))]
)
def test_random_submits_and_aborts_do_not_change_other_requests(
    seed: int, make_engine: MakeEngine, greedy: Callable[..., list[int]]
) -> None:
    """Aborts hit requests that wait, prefill, decode, and are preempted."""
    chance = random.Random(seed)
    engine = make_engine(num_blocks=20, max_batched_tokens=6, max_num_seqs=5)
    coming = [one for _ in range(2) for one in mixed_requests()]
    coming = [
        request(f"{index}", one.prompt, one.dial.reasoning_lambda)
        for index, one in enumerate(coming)
    ]
    events: Events = {}
    for one in steps_of(engine, chance, list(coming), events):
        events[one.request_id].append(one)
    for one in coming:
        mine, expected = events[one.request_id], greedy(one.prompt, one.dial.reasoning_lambda)
        reason = mine[-1].finish_reason
        assert reason in (FinishReason.LENGTH, FinishReason.ABORT)
        assert_ended_once(mine, reason)
        assert tokens_of(mine) == expected[: len(tokens_of(mine))]
        assert reason is FinishReason.ABORT or tokens_of(mine) == expected
    assert {mine[-1].finish_reason for mine in events.values()} == {"length", "abort"}


def steps_of(
    engine: Engine, chance: random.Random, coming: list[EngineRequest], events: Events
) -> Iterator[TokenEvent]:
    """Yields the events of steps, between which requests are submitted and aborted."""
    while coming or not engine.idle:
        if coming and chance.random() < 0.4:
            one = coming.pop(0)
            engine.submit(one)
            events[one.request_id] = []
        if events and chance.random() < 0.1:
            aborted = engine.abort(chance.choice(list(events)))
            engine.scheduler.check_integrity()
            if aborted is not None:
                yield aborted
        yield from checked_step(engine)


def test_sampled_answers_are_the_same_alone_in_a_batch_and_after_preemption(
    make_engine: MakeEngine,
) -> None:
    requests = [
        request(f"r{seed}", (*COMMON, seed), 0.1 * seed, temperature=1.0, top_p=0.95, seed=seed)
        for seed in range(8)
    ]
    alone = {one.request_id: tokens_of(answer(make_engine(), one)) for one in requests}
    assert len(set(map(tuple, alone.values()))) == len(requests)
    assert all_tokens(run_to_end(make_engine(), *requests)) == alone
    crowded = make_engine(num_blocks=12, max_batched_tokens=5)
    assert all_tokens(run_to_end(crowded, *requests)) == alone
    assert crowded.stats().preemptions > 0


def test_without_a_seed_answers_differ(engine: Engine) -> None:
    requests = [request(str(index), temperature=1.0) for index in range(5)]
    assert len({tuple(one) for one in all_tokens(run_to_end(engine, *requests)).values()}) > 1


def test_penalties_are_the_same_after_preemption(make_engine: MakeEngine) -> None:
    params: dict[str, Any] = {"frequency_penalty": 1.5, "repetition_penalty": 1.2}
    requests = mixed_requests(**params)
    alone = {one.request_id: tokens_of(answer(make_engine(), one)) for one in requests}
    crowded = make_engine(num_blocks=15)
    assert all_tokens(run_to_end(crowded, *requests)) == alone
    assert crowded.stats().preemptions > 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_endpoint_way_and_the_pair_way_give_the_same_tokens(
    value: float, make_engine: MakeEngine, greedy: Callable[..., list[int]]
) -> None:
    engine = make_engine(prefix_caching=False, blend_policy="pair")
    alone = answer(engine, request(value=value))
    stats = engine.stats()
    assert (stats.endpoint_executions, stats.pair_executions) == (NEW_TOKENS * GROUPS, 0)
    mixed = run_to_end(engine, request(value=value), request("other", value=0.4))["r"]
    assert engine.stats().pair_executions == NEW_TOKENS * GROUPS
    assert tokens_of(alone) == tokens_of(mixed) == greedy(COMMON, value)


def test_generate_gives_the_events_of_every_request(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    requests = mixed_requests()
    events = engine.generate(requests)
    assert list(events) == [one.request_id for one in requests]
    assert tokens_of(events["r4"]) == greedy(requests[4].prompt, LAMBDAS[4])


# --- The prefix cache ---------------------------------------------------------------------------

PROMPT = tuple(range(20, 33))  # 13 tokens: three full blocks can be found, one token is computed


def cached_tokens(engine: Engine, one: EngineRequest) -> int:
    cached = {event.cached_tokens for event in answer(engine, one)}
    assert len(cached) == 1
    return cached.pop()


def test_the_same_prompt_shares_kv_at_one_lambda_only(engine: Engine) -> None:
    assert cached_tokens(engine, request("a", PROMPT, 0.5)) == 0
    assert cached_tokens(engine, request("b", PROMPT, 0.5)) == 12
    assert cached_tokens(engine, request("c", PROMPT, 0.51)) == 0
    assert cached_tokens(engine, request("d", PROMPT, 0.51)) == 12


def test_a_prompt_that_is_all_cached_still_computes_its_last_block(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    assert cached_tokens(engine, request("a", PROMPT[:12])) == 0
    events = answer(engine, request("b", PROMPT[:12]))
    assert events[0].cached_tokens == 8
    assert tokens_of(events) == greedy(PROMPT[:12])


def test_requests_with_different_salts_share_no_kv(engine: Engine) -> None:
    assert cached_tokens(engine, request("a", PROMPT)) == 0
    assert cached_tokens(engine, request("b", PROMPT, salt="tenant")) == 0
    assert cached_tokens(engine, request("c", PROMPT, salt="tenant")) == 12


def test_an_answer_is_found_again_as_a_prompt(engine: Engine) -> None:
    first = tokens_of(answer(engine, request("a", PROMPT)))
    assert cached_tokens(engine, request("b", (*PROMPT, *first))) == 20  # the last has no KV


def test_a_running_request_shares_its_computed_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=13)
    engine.submit(request("a", PROMPT))
    first_events(engine)
    events = answer(engine, request("b", (*PROMPT, 50)))
    assert events[0].cached_tokens == 12


def test_prefix_counters_count_queried_and_found_tokens(engine: Engine) -> None:
    run_to_end(engine, request("a", PROMPT))
    run_to_end(engine, request("b", PROMPT), request("c", PROMPT, 0.1))
    assert engine.stats().prefix_queried_tokens == 3 * len(PROMPT)
    assert engine.stats().prefix_hit_tokens == 12


def test_without_a_prefix_cache_nothing_is_found(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    assert [cached_tokens(engine, request(name, PROMPT)) for name in "ab"] == [0, 0]
    assert engine.stats().prefix_queried_tokens == 0


# --- Ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["eos_token_ids", "stop_token_ids"])
def test_an_end_token_is_the_last_of_the_answer(
    field: str, engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    end = greedy()[4]
    events = answer(engine, request(**{field: frozenset({end})}))
    assert tokens_of(events) == greedy()[: greedy().index(end) + 1]
    assert_ended_once(events, FinishReason.STOP)


def test_with_ignore_eos_only_stop_tokens_end_the_answer(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    eos, stop = frozenset({greedy()[1]}), frozenset({greedy()[6]} - {greedy()[1]})
    go_on = answer(engine, request(eos_token_ids=eos, ignore_eos=True))
    assert tokens_of(go_on) == greedy()
    ended = answer(engine, request(eos_token_ids=eos, stop_token_ids=stop, ignore_eos=True))
    assert_ended_once(ended, FinishReason.STOP)


def test_no_end_token_is_drawn_before_min_tokens(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    ends = frozenset(greedy()[:3])
    events = answer(engine, request(eos_token_ids=ends, min_tokens=5, max_tokens=6))
    assert not ends.intersection(tokens_of(events)[:5])
    assert len(tokens_of(events)) == 6


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens_is_exact(limit: int, engine: Engine) -> None:
    events = answer(engine, request(max_tokens=limit))
    assert len(tokens_of(events)) == limit
    assert_ended_once(events, FinishReason.LENGTH)


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_full_context_ends_the_answer(limit: int | None, make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=21)
    events = answer(engine, request(prompt=PROMPT, max_tokens=limit))
    assert len(tokens_of(events)) == 21 - len(PROMPT)
    assert_ended_once(events, FinishReason.LENGTH)


def test_the_longest_prompt_gets_one_token(make_engine: MakeEngine) -> None:
    events = answer(make_engine(max_model_len=14), request(prompt=PROMPT))
    assert len(tokens_of(events)) == 1


def test_one_sequence_can_fill_every_block(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=5, max_batched_tokens=3)
    assert engine.info.max_model_len == 20
    events = answer(engine, request(prompt=PROMPT, max_tokens=None))
    assert len(tokens_of(events)) == 20 - len(PROMPT)


# --- Aborts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(8), ids=lambda steps: f"after {steps} steps")
def test_an_abort_at_any_step_frees_all_blocks(steps: int, make_engine: MakeEngine) -> None:
    """The request waits after 0 steps, prefills in chunks until 4, and decodes later."""
    engine = make_engine(max_batched_tokens=4, prefix_caching=False)
    engine.submit(request(prompt=PROMPT))
    for _ in range(steps):
        checked_step(engine)
    event = engine.abort("r")
    assert event is not None
    assert (event.token_id, event.finish_reason) == (None, FinishReason.ABORT)
    engine.scheduler.check_integrity()
    assert engine.idle
    assert engine.stats().used_blocks == 0
    assert engine.step() == []


def test_an_abort_of_an_unknown_or_finished_request_has_no_event(engine: Engine) -> None:
    assert engine.abort("never") is None
    answer(engine, request())
    assert engine.abort("r") is None


def test_an_id_can_be_used_again_after_its_end(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    engine.submit(request())
    engine.abort("r")
    assert tokens_of(answer(engine, request())) == greedy()


# --- Rejected requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"prompt": ()}, "prompt", None),
        ({"prompt": (1,) * 32}, "prompt", "context_length_exceeded"),
        ({"prompt": (1, VOCABULARY)}, "prompt", None),
        ({"prompt": (-1, 1)}, "prompt", None),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"logit_bias": ((VOCABULARY, 1.0),)}, "logit_bias", None),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias", None),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_computed_is_rejected_and_its_id_stays_free(
    changes: dict[str, Any], param: str, code: str | None, make_engine: MakeEngine
) -> None:
    engine = make_engine(max_model_len=32)
    with pytest.raises(RequestRejected) as caught:
        engine.submit(request(**changes))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert engine.idle
    answer(engine, request())  # its id is free


def test_an_id_in_use_is_rejected_and_its_request_continues(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    engine.submit(request())
    with pytest.raises(RequestRejected, match="in use"):
        engine.submit(request(prompt=PROMPT))
    events = [event for _ in range(NEW_TOKENS) for event in first_events(engine)]
    assert tokens_of(events) == greedy()


# --- A request that fails -----------------------------------------------------------------------

BROKEN = 90  # the token that stands for an overflow in the model


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Makes the embedding of the BROKEN token NaN, and so its KV, until the patch is undone."""
    right = PairEmbedding.forward

    def broken(self: PairEmbedding, input: Tensor) -> Tensor:
        out = right(self, input)
        return out.masked_fill((input == BROKEN).unsqueeze(-1), torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(PairEmbedding, "forward", broken)
        yield patch


FAILING = (*PROMPT[:6], BROKEN, *PROMPT[:6])


@pytest.mark.usefixtures("overflow")
def test_a_request_whose_logits_are_not_finite_fails_alone(
    make_engine: MakeEngine, greedy: Callable[..., list[int]]
) -> None:
    engine = make_engine(max_batched_tokens=9)
    requests = [request("bad", FAILING), *mixed_requests()]
    events = run_to_end(engine, *requests)
    assert_ended_once(events["bad"], FinishReason.ERROR)
    assert events["bad"][-1].error
    assert tokens_of(events["bad"]) == []
    for one in requests[1:]:
        assert tokens_of(events[one.request_id]) == greedy(one.prompt, one.dial.reasoning_lambda)
    assert engine.stats().used_blocks == 0


@pytest.mark.usefixtures("overflow")
@pytest.mark.parametrize("steps", [1, 2, 3, None], ids=lambda steps: f"{steps} steps")
def test_the_next_request_in_a_failed_requests_blocks_gets_the_right_tokens(
    steps: int | None, make_engine: MakeEngine, greedy: Callable[..., list[int]]
) -> None:
    """This holds too if it is aborted in its prefill, before its NaN is noticed."""
    engine = make_engine(num_blocks=9, max_batched_tokens=5)
    for salt in "abc":
        run_some_steps(engine, request("bad", FAILING, salt=salt), steps)
    assert tokens_of(answer(engine, request(prompt=PROMPT))) == greedy(PROMPT)


def run_some_steps(engine: Engine, one: EngineRequest, steps: int | None) -> None:
    engine.submit(one)
    while not engine.idle and (steps is None or steps > 0):
        checked_step(engine)
        steps = steps and steps - 1
    engine.abort(one.request_id)


def test_a_failed_requests_prompt_is_computed_again(
    overflow: pytest.MonkeyPatch, make_engine: MakeEngine, greedy: Callable[..., list[int]]
) -> None:
    """Its KV was once zeroed but stayed in the prefix cache, and the answer came from zeros."""
    engine = make_engine(max_batched_tokens=5)
    assert_ended_once(answer(engine, request("bad", FAILING)), FinishReason.ERROR)
    overflow.undo()
    assert tokens_of(answer(engine, request(prompt=FAILING))) == greedy(FAILING)


@pytest.mark.usefixtures("overflow")
def test_a_failure_does_not_change_shared_blocks(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    """They were once zeroed while another request was reading them."""
    engine.submit(request("good", PROMPT))
    first = first_events(engine)
    events = run_to_end(engine, request("bad", (*PROMPT, BROKEN)))
    assert_ended_once(events["bad"], FinishReason.ERROR)
    assert events["bad"][0].cached_tokens == 12
    assert tokens_of(first + events["good"]) == greedy(PROMPT)


# --- Events and stats ---------------------------------------------------------------------------


def test_reasoning_tokens_are_those_between_the_tags(
    engine: Engine, greedy: Callable[..., list[int]]
) -> None:
    close = greedy()[5]
    inside = greedy().index(close)
    tags = ThinkPolicy(open_id=0, close_id=close, opened_by_prompt=True)
    counts = [event.reasoning_tokens for event in answer(engine, request(think=tags))]
    assert counts == [min(index + 1, inside) for index in range(NEW_TOKENS)]


def test_logprobs_are_those_of_the_merged_checkpoint(
    engine: Engine, qwen3_pair: Directories, greedy: Callable[..., list[int]]
) -> None:
    rows = oracle.logits(oracle.merged(*qwen3_pair, 0.5), [*COMMON, *greedy()])
    expected = rows[len(COMMON) - 1 : -1].log_softmax(1)
    for row, event in enumerate(answer(engine, request(logprobs=3))):
        assert event.logprobs is not None
        assert event.logprobs.token == pytest.approx(expected[row].max().item(), abs=1e-4)
        best = expected[row].topk(3)
        assert [token for token, _ in event.logprobs.top] == best.indices.tolist()


def test_events_report_the_seconds_that_the_request_waited(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    events = run_to_end(engine, request("first"), request("second"))
    assert 0 <= events["first"][0].queue_seconds < events["second"][0].queue_seconds


def test_stats_describe_the_current_state(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, max_batched_tokens=32, blend_policy="pair")
    for name, value in (("a", 1.0), ("b", 0.3), ("c", 0.3), ("d", 0.0)):
        engine.submit(request(name, PROMPT, value))
    checked_step(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 2)
    assert (stats.running_lambdas, stats.waiting_lambdas) == ((0.3, 1.0), (0.0, 0.3))
    assert (stats.used_blocks, stats.total_blocks) == (8, 64)
    executions = (stats.pair_executions, stats.endpoint_executions, stats.blended_executions)
    assert (stats.steps, *executions) == (1, GROUPS, 0, 0)


def test_every_group_of_every_forward_is_counted_under_one_way(make_engine: MakeEngine) -> None:
    engine = make_engine(blend_policy="pair")
    run_to_end(engine, *mixed_requests())
    run_to_end(engine, request(value=1.0))
    stats = engine.stats()
    assert stats.endpoint_executions >= NEW_TOKENS * GROUPS
    assert stats.steps * GROUPS == stats.endpoint_executions + stats.pair_executions
    engine.step()  # idle: nothing runs
    assert engine.stats() == stats
