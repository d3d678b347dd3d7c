"""A think block opens and closes by token ids, and the engine forces it closed at its cap.

First come tests of the state alone, then of an engine whose model follows logit biases.
"""

import pickle
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.config import TokenMarks
from mi_runtime.engine import Engine
from mi_runtime.request import (
    Dial,
    EngineRequest,
    EngineStats,
    FinishReason,
    Phase,
    SamplingParams,
    StepReport,
    ThinkPolicy,
    TokenEvent,
)
from mi_runtime.scheduling.thinking import ThinkingState
from tests.runtime.conftest import MakeEngine
from tests.runtime.families import VOCABULARY

OPEN, CLOSE = 1, 2
WORDS = st.lists(st.integers(3, 9))
STOP, ALIAS = 3, 4  # ends a sentence; closes an open block as CLOSE does
MARKS = TokenMarks(soft_ends=frozenset({STOP}))
SPACE = 0
WITH_WHITESPACE = TokenMarks(whitespace=frozenset({SPACE}))


def after(
    tokens: list[int],
    *,
    opened_by_prompt: bool = False,
    cap: int | None = None,
    marks: TokenMarks | None = None,
) -> ThinkingState:
    """Returns the state of a block after these tokens."""
    state = ThinkingState(ThinkPolicy(OPEN, CLOSE, opened_by_prompt, cap), marks)
    for token in tokens:
        state.observe(token)
    return state


def test_a_block_opened_by_the_prompt_counts_from_the_first_token() -> None:
    state = after([7, 8], opened_by_prompt=True)
    assert (state.phase, state.reasoning_tokens) == (Phase.INSIDE, 2)


def test_an_answer_without_tags_has_no_reasoning() -> None:
    state = after([7, 8])
    assert (state.phase, state.reasoning_tokens) == (Phase.OUTSIDE, 0)


def test_a_close_tag_that_closes_nothing_is_an_answer_token() -> None:
    assert after([7, CLOSE, 8]).phase is Phase.OUTSIDE
    assert after([CLOSE, OPEN, 8]).reasoning_tokens == 1


def test_a_repeated_open_tag_inside_the_block_counts_as_reasoning() -> None:
    assert after([OPEN, 7], opened_by_prompt=True).reasoning_tokens == 2


def test_nothing_reopens_a_closed_block() -> None:
    state = after([7, CLOSE, OPEN, 8, CLOSE], opened_by_prompt=True)
    assert (state.phase, state.reasoning_tokens) == (Phase.CLOSED, 1)


def test_whitespace_may_stand_before_the_open_tag() -> None:
    assert after([SPACE, SPACE, OPEN], marks=WITH_WHITESPACE).phase is Phase.INSIDE


def test_after_the_first_text_an_open_tag_is_text() -> None:
    state = after([SPACE, 7, OPEN, 7], cap=0, marks=WITH_WHITESPACE)
    assert (state.phase, state.reasoning_tokens) == (Phase.CLOSED, 0)
    assert state.forced_token is None


@given(lead=WORDS, reasoning=WORDS, answer=st.lists(st.integers(1, 9)))
def test_the_reasoning_is_the_tokens_between_the_tags(
    lead: list[int], reasoning: list[int], answer: list[int]
) -> None:
    state = after([*lead, OPEN, *reasoning, CLOSE, *answer])
    assert (state.phase, state.reasoning_tokens) == (Phase.CLOSED, len(reasoning))


@given(reasoning=WORDS, answer=st.lists(st.integers(1, 9)))
def test_a_block_opened_by_the_prompt_ends_as_one_opened_by_the_answer(
    reasoning: list[int], answer: list[int]
) -> None:
    by_prompt = after([*reasoning, CLOSE, *answer], opened_by_prompt=True)
    by_answer = after([OPEN, *reasoning, CLOSE, *answer])
    assert by_prompt.phase is by_answer.phase
    assert by_prompt.reasoning_tokens == by_answer.reasoning_tokens


# --- Closing by force ---------------------------------------------------------------------------

TOKENS = st.lists(st.integers(OPEN, 9), max_size=40)
POLICIES = st.builds(
    ThinkPolicy,
    open_id=st.just(OPEN),
    close_id=st.just(CLOSE),
    opened_by_prompt=st.booleans(),
    cap=st.none() | st.integers(0, 12),
    closing=st.sampled_from([(), (CLOSE,), (10, CLOSE), (CLOSE, 11), (10, 11, CLOSE, 12)]),
    soft_window=st.integers(0, 15),
    close_aliases=st.sampled_from([frozenset(), frozenset({ALIAS})]),
    forbid_eos=st.booleans(),
)


def write(policy: ThinkPolicy, wanted: list[int]) -> tuple[list[int], ThinkingState]:
    """Returns the answer of a model that wants these tokens, and the final state of its block."""
    state, answer = ThinkingState(policy, MARKS), list[int]()
    for token in wanted:
        while (forced := state.forced_token) is not None:
            answer.append(forced)
            state.observe(forced)
        answer.append(token)
        state.observe(token)
    while (forced := state.forced_token) is not None:
        answer.append(forced)
        state.observe(forced)
    return answer, state


def write_slowly(policy: ThinkPolicy, wanted: list[int]) -> list[int]:
    """Inserts the closing sequence into the complete answer, as a reference."""
    first = 0
    if not policy.opened_by_prompt:
        if OPEN not in wanted:
            return wanted
        first = wanted.index(OPEN) + 1
    for end in range(first, len(wanted) + 1):
        inside = wanted[first:end]
        if {CLOSE, *policy.close_aliases} & set(inside):
            return wanted
        count, last = len(inside), wanted[end - 1 : end]
        if policy.cap is None:
            continue
        soft = bool(inside) and last[0] in MARKS.soft_ends
        if count >= policy.cap or (soft and count >= policy.cap - policy.soft_window):
            return [*wanted[:end], *policy.closing, *wanted[end:]]
    return wanted


@given(policy=POLICIES, wanted=TOKENS)
def test_the_closing_sequence_is_written_once_and_the_answer_continues(
    policy: ThinkPolicy, wanted: list[int]
) -> None:
    answer, state = write(policy, wanted)
    assert answer == write_slowly(policy, wanted)
    assert state.forced_close == (answer != wanted)
    assert state.forced_token is None


@given(policy=POLICIES, wanted=TOKENS)
def test_reasoning_never_exceeds_the_cap(policy: ThinkPolicy, wanted: list[int]) -> None:
    _, state = write(policy, wanted)
    if policy.cap is not None:
        assert state.reasoning_tokens <= policy.cap
        assert state.phase is not Phase.INSIDE or state.reasoning_tokens < policy.cap


@given(policy=POLICIES, wanted=TOKENS)
def test_a_soft_close_follows_a_soft_end_within_the_window(
    policy: ThinkPolicy, wanted: list[int]
) -> None:
    answer, state = write(policy, wanted)
    if state.forced_close and state.reasoning_tokens != policy.cap:
        assert policy.cap is not None
        assert policy.cap - policy.soft_window <= state.reasoning_tokens < policy.cap
        size = len(policy.closing)
        ends = [at for at in range(len(answer)) if answer[at : at + size] == list(policy.closing)]
        assert any(at and answer[at - 1] in MARKS.soft_ends for at in ends)


@given(policy=POLICIES, wanted=TOKENS)
def test_exactly_one_token_is_reported_as_closing_the_block(
    policy: ThinkPolicy, wanted: list[int]
) -> None:
    answer, written = write(policy, wanted)
    state = ThinkingState(policy, MARKS)
    closed = [at for at, token in enumerate(answer) if state.observe(token)]
    assert len(closed) == (written.phase is Phase.CLOSED)
    assert all(answer[at] in {CLOSE, *policy.close_aliases} for at in closed)


@given(policy=POLICIES, wanted=TOKENS)
def test_an_end_token_is_forbidden_only_inside_the_block_and_only_by_forbid_eos(
    policy: ThinkPolicy, wanted: list[int]
) -> None:
    answer, _ = write(policy, wanted)
    state = ThinkingState(policy, MARKS)
    for token in answer:
        assert state.forbids_eos == (policy.forbid_eos and state.phase is Phase.INSIDE)
        state.observe(token)


@pytest.mark.parametrize(
    ("window", "wanted", "answer"),
    [
        (0, [7, STOP, 7, STOP, 7, 8], [7, STOP, 7, STOP, 7, CLOSE, 8]),
        (1, [7, STOP, 7, STOP, 7, 8], [7, STOP, 7, STOP, CLOSE, 7, 8]),
        (3, [7, STOP, 7, STOP, 7, 8], [7, STOP, CLOSE, 7, STOP, 7, 8]),
        (2, [7, STOP, 7, 7, 7, 8], [7, STOP, 7, 7, 7, CLOSE, 8]),
        (99, [STOP, 7, 8], [STOP, CLOSE, 7, 8]),
    ],
)
def test_the_window_is_counted_back_from_the_cap(
    window: int, wanted: list[int], answer: list[int]
) -> None:
    policy = ThinkPolicy(OPEN, CLOSE, True, cap=5, soft_window=window)
    assert write(policy, wanted)[0] == answer


@pytest.mark.parametrize("opened_by_prompt", [True, False])
def test_a_cap_of_zero_closes_the_block_as_it_opens(opened_by_prompt: bool) -> None:
    policy = ThinkPolicy(OPEN, CLOSE, opened_by_prompt, cap=0, closing=(10, CLOSE))
    lead = [] if opened_by_prompt else [7, OPEN]
    answer, state = write(policy, [*lead, 8])
    assert answer == [*lead, 10, CLOSE, 8]
    assert (state.reasoning_tokens, state.phase, state.forced_close) == (0, Phase.CLOSED, True)


def test_a_forced_close_is_reported_from_the_closing_tag_on() -> None:
    state = ThinkingState(ThinkPolicy(OPEN, CLOSE, True, cap=1, closing=(10, CLOSE)))
    for token, closed in ((7, False), (10, False), (CLOSE, True)):
        state.observe(token)
        assert state.forced_close is closed


@pytest.mark.parametrize("opened_by_prompt", [True, False])
def test_an_alias_closes_an_open_block_and_nothing_else(opened_by_prompt: bool) -> None:
    policy = ThinkPolicy(OPEN, CLOSE, opened_by_prompt, close_aliases=frozenset({ALIAS}))
    _, state = write(policy, [ALIAS])
    assert state.phase is (Phase.CLOSED if opened_by_prompt else Phase.OUTSIDE)
    assert not state.forced_close


def test_a_closing_sequence_without_the_tag_and_a_negative_cap_are_refused() -> None:
    with pytest.raises(ValueError, match="closing tag"):
        ThinkPolicy(OPEN, CLOSE, closing=(7, 8))
    with pytest.raises(ValueError, match="-1"):
        ThinkPolicy(OPEN, CLOSE, cap=-1)
    assert ThinkPolicy(OPEN, CLOSE).closing == (CLOSE,)


# --- In the engine ------------------------------------------------------------------------------

EOS, WORD = 5, 6
CAPPED = ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=4, closing=(10, CLOSE, 11))
PROMPT = (20, 21, 22)


def biased(*tokens: int, max_tokens: int = 12, temperature: float = 0.0) -> SamplingParams:
    """Returns sampling parameters that make the model prefer `tokens`, the first most."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=1,
        logit_bias=tuple((token, 500.0 - 100 * at) for at, token in enumerate(tokens)),
        eos_token_ids=frozenset({EOS}),
    )


def request(
    name: str, think: ThinkPolicy | None, sampling: SamplingParams | None = None
) -> EngineRequest:
    return EngineRequest(name, PROMPT, Dial(0.5), sampling or biased(WORD), think)


def answer_of(engine: Engine, request: EngineRequest) -> list[TokenEvent]:
    return engine.generate([request])[request.request_id]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def test_at_the_cap_the_engine_closes_the_block_and_the_answer_continues(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    events = answer_of(engine, request("r", CAPPED))
    assert tokens_of(events) == [*[WORD] * 4, 10, CLOSE, 11, *[WORD] * 5]
    assert [event.reasoning_tokens for event in events] == [1, 2, 3, *[4] * 9]
    assert [event.forced_close for event in events] == [False] * 5 + [True] * 7
    assert [event.phase for event in events] == [Phase.INSIDE] * 5 + [Phase.CLOSED] * 7
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().forced_closes == 1


def test_inside_the_soft_window_the_engine_closes_the_block_at_a_soft_end(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(marks=TokenMarks(soft_ends=frozenset({WORD})))
    events = answer_of(engine, request("r", replace(CAPPED, soft_window=2)))
    assert tokens_of(events)[:5] == [WORD, WORD, 10, CLOSE, 11]
    assert events[-1].reasoning_tokens == 2


def test_a_cap_of_zero_answers_without_reasoning(make_engine: MakeEngine) -> None:
    events = answer_of(make_engine(), request("r", replace(CAPPED, cap=0)))
    assert tokens_of(events)[:4] == [10, CLOSE, 11, WORD]
    assert (events[0].reasoning_tokens, events[-1].reasoning_tokens) == (0, 0)


def test_a_block_that_the_answer_opens_is_capped_too(make_engine: MakeEngine) -> None:
    think = replace(CAPPED, opened_by_prompt=False, cap=0)
    events = answer_of(make_engine(), request("r", think, biased(OPEN, max_tokens=6)))
    assert tokens_of(events) == [OPEN, 10, CLOSE, 11, OPEN, OPEN]
    assert [event.phase for event in events] == [Phase.INSIDE] * 2 + [Phase.CLOSED] * 4


def test_an_event_without_a_token_has_the_phase_after_the_prompt(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    (end,) = answer_of(engine, request("r", CAPPED, biased(WORD, max_tokens=0)))
    assert (end.token_id, end.phase) == (None, Phase.INSIDE)
    (end,) = answer_of(engine, request("s", None, biased(WORD, max_tokens=0)))
    assert (end.token_id, end.phase) == (None, Phase.OUTSIDE)


def test_phases_are_sent_through_the_pipe_as_plain_numbers(make_engine: MakeEngine) -> None:
    events = answer_of(make_engine(), request("r", CAPPED))
    assert {type(event.phase) for event in events} == {int}
    report = StepReport(tuple(events), EngineStats())
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_block_closed_by_an_alias_is_not_a_forced_close(make_engine: MakeEngine) -> None:
    engine, think = make_engine(), replace(CAPPED, close_aliases=frozenset({WORD}))
    events = answer_of(engine, request("r", think))
    assert tokens_of(events) == [WORD] * 12
    assert not any(event.forced_close for event in events)
    assert engine.stats().forced_closes == 0


def test_with_forbid_eos_the_answer_does_not_end_inside_the_block(
    make_engine: MakeEngine,
) -> None:
    engine, wants_end = make_engine(), biased(EOS, WORD)
    allowed = answer_of(engine, request("allowed", CAPPED, wants_end))
    assert tokens_of(allowed) == [EOS]
    assert not allowed[-1].forced_close
    forbidden = answer_of(engine, request("forbidden", replace(CAPPED, forbid_eos=True), wants_end))
    assert tokens_of(forbidden) == [*[WORD] * 4, 10, CLOSE, 11, EOS]
    assert forbidden[-1].finish_reason is FinishReason.STOP
    unopened = replace(CAPPED, forbid_eos=True, opened_by_prompt=False)
    assert tokens_of(answer_of(engine, request("unopened", unopened, wants_end))) == [EOS]


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_an_answer_cut_before_the_closing_tag_is_not_a_forced_close(
    make_engine: MakeEngine, max_tokens: int
) -> None:
    engine = make_engine()
    events = answer_of(engine, request("r", CAPPED, biased(WORD, max_tokens=max_tokens)))
    full = [*[WORD] * 4, 10, CLOSE, 11, WORD]
    assert tokens_of(events) == full[:max_tokens]
    assert events[-1].forced_close == (CLOSE in full[:max_tokens])
    assert engine.stats().forced_closes == (CLOSE in full[:max_tokens])


@pytest.mark.parametrize("num_blocks", [64, 5])
def test_each_forced_close_is_counted_once(make_engine: MakeEngine, num_blocks: int) -> None:
    """A sequence that is preempted afterwards recomputes forced tokens like any others."""
    engine = make_engine(num_blocks=num_blocks)
    requests = [request(str(index), CAPPED) for index in range(3)]
    requests += [
        request("open", None),
        request("alias", replace(CAPPED, close_aliases=frozenset({WORD}))),
    ]
    events = engine.generate(requests)
    assert bool(engine.stats().preemptions) == (num_blocks == 5)
    expected = [*[WORD] * 4, 10, CLOSE, 11, *[WORD] * 5]
    assert [tokens_of(events[str(index)]) for index in range(3)] == [expected] * 3
    assert engine.stats().forced_closes == 3


def test_the_forced_close_of_an_aborted_request_is_counted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.submit(request("r", CAPPED))
    for _ in range(7):
        engine.step()
    event = engine.abort("r")
    assert event is not None
    assert event.forced_close
    assert engine.stats().forced_closes == 1


def test_forced_tokens_draw_no_random_number(make_engine: MakeEngine) -> None:
    """Other requests draw the same numbers, and so does the request after its forced tokens."""
    engine = make_engine()
    free = SamplingParams(max_tokens=12, temperature=1.0, seed=7)
    alone = tokens_of(answer_of(engine, request("sampled", None, free)))
    together = engine.generate(
        [
            request("before", CAPPED),
            request("sampled", None, free),
            request("after", replace(CAPPED, cap=0)),
        ]
    )
    assert tokens_of(together["sampled"]) == alone
    assert len(set(alone)) > 6
    engine.submit(request("counted", CAPPED, free))
    sequence = engine.scheduler.waiting.first
    while not engine.idle:
        engine.step()
    assert sequence.forced_close
    generator = random.Random(free.seed)
    for _ in range(12 - len(CAPPED.closing)):
        generator.random()
    assert sequence.rng.random() == generator.random()


def test_the_log_probabilities_of_forced_tokens_are_the_models_own(
    make_engine: MakeEngine,
) -> None:
    sampling = replace(biased(WORD), logprobs=VOCABULARY)
    for event in answer_of(make_engine(), request("r", CAPPED, sampling)):
        assert event.logprobs is not None
        assert event.token_id is not None
        assert event.logprobs.token == pytest.approx(dict(event.logprobs.top)[event.token_id])
