"""The scheduler gives every request the tokens that it gets alone, whatever runs with it.

First come small cases, then random workloads. They run a fake model whose every KV entry is a
digest of all that real KV depends on, and whose next token is a digest of the sequence's KV as read
through the block table. A wrong table, stale KV, or KV shared between dials or salts gives wrong
tokens.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_runtime.request import (
    Dial,
    EngineRequest,
    FinishReason,
    RequestRejected,
    SamplingParams,
    ThinkPolicy,
    TokenEvent,
    TokenLogprobs,
)
from mi_runtime.scheduling.block_pool import BlockPool
from mi_runtime.scheduling.chunk import Chunk, Sampled
from mi_runtime.scheduling.scheduler import SCORED_ROWS, Scheduler
from mi_runtime.scheduling.sequence import Sequence, SequenceStatus

VOCAB = 40
EOS, THINK, END_THINK = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    num_blocks: int = 64
    block_size: int = 4
    max_model_len: int = 64
    max_num_seqs: int = 8
    max_batched_tokens: int = 64
    prefix_caching: bool = True
    asynchronous: bool = False

    def scheduler(self) -> Scheduler:
        return Scheduler(
            BlockPool(self.num_blocks, self.block_size, "pair"),
            vocab_size=VOCAB,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_batched_tokens=self.max_batched_tokens,
            prefix_caching=self.prefix_caching,
        )


def request(
    request_id: str = "r",
    prompt: tuple[int, ...] = (5, 6, 7),
    *,
    dial: float = 0.5,
    salt: str = "",
    think: ThinkPolicy | None = None,
    answer_dial: float | None = None,
    max_tokens: int | None = None,
    min_tokens: int = 0,
    seed: int | None = 0,
    prompt_logprobs: int | None = None,
    priority: int = 0,
) -> EngineRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=seed,
        eos_token_ids=frozenset({EOS}),
        prompt_logprobs=prompt_logprobs,
    )
    answer = None if answer_dial is None else Dial(answer_dial)
    return EngineRequest(
        request_id, prompt, Dial(dial), sampling, think, salt, answer, priority=priority
    )


# --- The fake model -----------------------------------------------------------------------------


def kv_entry(req: EngineRequest, token: int, before: int, dial: Dial | None = None) -> int:
    value = (dial or req.dial).reasoning_lambda
    return hash((value, crc32(req.cache_salt.encode()), token, before))


def next_token(seq: Sequence, kv: tuple[int, ...]) -> int:
    if seq.forced_token is not None:
        return seq.forced_token
    token = hash((kv, seq.rng.random())) % VOCAB
    return END_THINK if seq.forbids_ending and token in seq.ending_token_ids else token


def score(entry: int, token: int) -> TokenLogprobs:
    """Returns the made-up score of a token after the position whose KV entry is `entry`."""
    return TokenLogprobs(float(hash((entry, token)) % 1000), ())


def scores_alone(req: EngineRequest) -> tuple[TokenLogprobs, ...] | None:
    if req.sampling.prompt_logprobs is None:
        return None
    scores, entry = list[TokenLogprobs](), 0
    for token, following in zip(req.prompt, req.prompt[1:], strict=False):
        entry = kv_entry(req, token, entry)
        scores.append(score(entry, following))
    return tuple(scores)


def answer_alone(req: EngineRequest, limits: Limits) -> tuple[list[int], FinishReason]:
    """Returns the reference answer, computed without blocks, batches or a scheduler."""
    seq, kv = Sequence(req), list[int]()
    if req.sampling.max_tokens == 0:
        return [], FinishReason.LENGTH
    while True:
        for token in seq.tokens[len(kv) :]:
            kv.append(kv_entry(req, token, kv[-1] if kv else 0, seq.dial_at(len(kv))))
        seq.append(next_token(seq, tuple(kv)))
        if seq.tokens[-1] == EOS:
            return seq.tokens[len(req.prompt) :], FinishReason.STOP
        full = len(seq) == limits.max_model_len
        if full or seq.output_length == req.sampling.max_tokens:
            return seq.tokens[len(req.prompt) :], FinishReason.LENGTH


def is_known(chunk: Chunk) -> bool:
    """Returns whether the chunk's tokens are known: the next one may still be drawn."""
    return chunk.start < len(chunk.sequence)


@dataclass
class FakeInFlightStep:
    """A step of the fake model, whose KV is written at once, and whose tokens are drawn later."""

    chunks: list[Chunk]
    kv: dict[Sequence, tuple[int, ...]]  # of the sequences that sample, as read
    scores: dict[Sequence, list[TokenLogprobs]]
    sampled: dict[Sequence, Sampled | None] = field(default_factory=dict)

    def sample(self) -> None:
        for seq, kv in self.kv.items():
            if not seq.ended:
                self.sampled[seq] = (next_token(seq, kv), None)


@dataclass
class FakeEngine:
    """Runs a scheduler over the fake model, and checks it at every step."""

    limits: Limits
    before_update: Callable[["FakeEngine", list[Chunk]], None] = lambda engine, chunks: None
    steps: int = 0
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    events: dict[str, list[TokenEvent]] = field(default_factory=dict)
    first_runs: list[str] = field(default_factory=list)
    in_flight: FakeInFlightStep | None = None
    ran_ahead: int = 0  # rows
    held_back: int = 0  # steps that left out the first of the running

    def __post_init__(self) -> None:
        self.scheduler = self.limits.scheduler()
        self.kv = [[0] * self.limits.block_size for _ in range(self.limits.num_blocks)]

    def submit(self, req: EngineRequest) -> Sequence:
        self.scheduler.check_request(req)
        sequence = Sequence(req)
        self.scheduler.add(sequence)
        self.requests[req.request_id] = req
        self.events[req.request_id] = []
        return sequence

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id)
        assert (event is None) == self.has_ended(request_id)
        if event is not None:
            self.take([event])
        self.scheduler.check_integrity()

    def step(self) -> list[Chunk]:
        first = self.first_of_running()
        chunks = self.scheduler.schedule()
        self.check(chunks, first)
        step = self.launch(chunks)
        self.before_update(self, chunks)
        self.take_results()
        step.sample()
        self.in_flight = step
        if not self.limits.asynchronous:
            self.take_results()
        self.steps += 1
        return chunks

    def launch(self, chunks: list[Chunk]) -> FakeInFlightStep:
        kv = {chunk.sequence: self.run(chunk) for chunk in chunks}
        return FakeInFlightStep(
            chunks,
            {chunk.sequence: kv[chunk.sequence] for chunk in chunks if chunk.samples},
            {chunk.sequence: self.score(chunk) for chunk in chunks if chunk.scored},
        )

    def take_results(self) -> None:
        step, self.in_flight = self.in_flight, None
        if step is not None:
            self.take(self.scheduler.update(step.chunks, step.sampled, step.scores))
            self.scheduler.check_integrity()

    def first_of_running(self) -> str | None:
        """Returns the first request that runs, or else that waits, by priority and arrival."""
        queue = self.scheduler.running or self.scheduler.waiting
        ids = [name for name in self.requests if queue.get(name) is not None]
        return min(ids, key=lambda name: self.requests[name].priority, default=None)

    def finish(self) -> None:
        while self.scheduler.unfinished:
            self.step()
        assert self.scheduler.blocks.referenced == 0

    def run(self, chunk: Chunk) -> tuple[int, ...]:
        """Writes the chunk's KV, and returns that of the sequence as read through its table."""
        seq, end = chunk.sequence, chunk.start + chunk.length
        for position in range(chunk.start, end):
            before = self.read(seq, position - 1) if position else 0
            dial = seq.dial_at(position)
            entry = kv_entry(seq.request, self.token(seq, position), before, dial)
            block, slot = divmod(position, self.limits.block_size)
            self.kv[seq.block_table[block]][slot] = entry
        return tuple(self.read(seq, position) for position in range(end))

    def token(self, seq: Sequence, position: int) -> int:
        """Returns the token at a position, which may be the one drawn in the step before."""
        if position < len(seq):
            return seq.tokens[position]
        assert position == len(seq)
        assert self.in_flight is not None
        drawn = self.in_flight.sampled[seq]
        assert drawn is not None
        return drawn[0]

    def score(self, chunk: Chunk) -> list[TokenLogprobs]:
        seq = chunk.sequence
        return [score(self.read(seq, i), seq.tokens[i + 1]) for i in chunk.scored]

    def read(self, seq: Sequence, position: int) -> int:
        block, slot = divmod(position, self.limits.block_size)
        return self.kv[seq.block_table[block]][slot]

    def check(self, chunks: list[Chunk], first: str | None) -> None:
        """Checks a batch. The first request is in it, unless its next token is not known yet."""
        self.scheduler.check_integrity()
        ids = [chunk.sequence.request_id for chunk in chunks]
        assert len(set(ids)) == len(ids)
        assert sum(chunk.length for chunk in chunks) <= self.limits.max_batched_tokens
        assert sum(len(chunk.scored) for chunk in chunks) <= SCORED_ROWS
        self.held_back += first is not None and first not in ids
        for chunk in chunks:
            assert chunk.start + chunk.length == chunk.sequence.computed
            assert chunk.length > 0
            assert is_known(chunk) or chunk.length == 1
            self.ran_ahead += not is_known(chunk)
        if first is not None and first not in ids:
            found = self.scheduler.running.get(first) or self.scheduler.waiting.get(first)
            assert found is not None
            assert found.in_flight
        self.first_runs += [name for name in ids if name not in self.first_runs]

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            assert not self.has_ended(event.request_id), "an event after the terminal one"
            self.events[event.request_id].append(event)

    def has_ended(self, request_id: str) -> bool:
        events = self.events[request_id]
        return bool(events) and events[-1].finish_reason is not None

    def tokens(self, request_id: str) -> list[int]:
        return [e.token_id for e in self.events[request_id] if e.token_id is not None]

    def check_answers(self) -> None:
        """Checks that every request has one terminal event, and the tokens that it gets alone."""
        for request_id, req in self.requests.items():
            reasons = [event.finish_reason for event in self.events[request_id]]
            assert [reason for reason in reasons if reason] == reasons[-1:]
            expected, reason = answer_alone(req, self.limits)
            self.check_scores(request_id, reasons[-1])
            if reasons[-1] in (FinishReason.ABORT, FinishReason.ERROR):
                answer = self.tokens(request_id)
                assert answer == expected[: len(answer)]
                assert len(answer) < max(1, len(expected))
            else:
                assert (self.tokens(request_id), reasons[-1]) == (expected, reason)

    def check_scores(self, request_id: str, reason: FinishReason | None) -> None:
        """Checks that the first event of an answer has the scores of the prompt, and no other."""
        reported = [event.prompt_logprobs for event in self.events[request_id]]
        assert all(scores is None for scores in reported[1:])
        if len(reported) > 1 or reason not in (FinishReason.ABORT, FinishReason.ERROR):
            assert reported[0] == scores_alone(self.requests[request_id])

    def check_order(self) -> None:
        """Checks that requests of equal priority ran in order of arrival."""
        arrived, ran = defaultdict[int, list[str]](list), defaultdict[int, list[str]](list)
        for request_id in self.requests:
            if request_id in self.first_runs:
                arrived[self.requests[request_id].priority].append(request_id)
        for request_id in self.first_runs:
            ran[self.requests[request_id].priority].append(request_id)
        assert ran == arrived


# --- Admission ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ((), None, ["empty"]),
        ((5, VOCAB), None, [str(VOCAB)]),
        ((-1, 5), None, ["-1"]),
        ((5,) * 64, "context_length_exceeded", ["64 tokens", "holds 64"]),
    ],
)
def test_a_prompt_that_cannot_be_computed_is_rejected(
    prompt: tuple[int, ...], code: str | None, words: list[str]
) -> None:
    scheduler = Limits(max_model_len=64).scheduler()
    with pytest.raises(RequestRejected) as rejection:
        scheduler.check_request(request(prompt=prompt))
    assert (rejection.value.param, rejection.value.code) == ("prompt", code)
    assert all(word in str(rejection.value) for word in words)
    assert not scheduler.unfinished


def test_a_prompt_that_leaves_room_for_one_token_gets_one() -> None:
    engine = FakeEngine(Limits(max_model_len=64))
    engine.submit(request(prompt=(5,) * 63))
    engine.finish()
    assert len(engine.tokens("r")) == 1


def test_a_request_id_in_use_is_rejected_and_free_again_at_the_end() -> None:
    engine = FakeEngine(Limits())
    engine.submit(request(max_tokens=2, min_tokens=2))
    with pytest.raises(RequestRejected, match="in use"):
        engine.scheduler.check_request(request())
    engine.step()
    with pytest.raises(RequestRejected, match="in use"):
        engine.scheduler.check_request(request())
    engine.finish()
    engine.scheduler.check_request(request())


def test_max_tokens_below_zero_is_rejected() -> None:
    with pytest.raises(RequestRejected) as rejection:
        Limits().scheduler().check_request(request(max_tokens=-1))
    assert rejection.value.param == "max_tokens"


def test_a_context_larger_than_the_pool_fails_an_assertion() -> None:
    with pytest.raises(AssertionError, match="must fit"):
        Limits(num_blocks=2, block_size=4, max_model_len=9).scheduler()


# --- Batches ------------------------------------------------------------------------------------


def lengths(chunks: list[Chunk]) -> list[tuple[str, int]]:
    return [(chunk.sequence.request_id, chunk.length) for chunk in chunks]


def test_a_scheduler_without_requests_has_an_empty_step() -> None:
    assert Limits().scheduler().schedule() == []


def test_a_long_prompt_runs_in_chunks_after_the_decodes() -> None:
    engine = FakeEngine(Limits(max_batched_tokens=6))
    engine.submit(request("a", min_tokens=20))
    assert lengths(engine.step()) == [("a", 3)]
    engine.submit(request("b", prompt=tuple(range(5, 17)), min_tokens=20))
    assert lengths(engine.step()) == [("a", 1), ("b", 5)]
    assert lengths(engine.step()) == [("a", 1), ("b", 5)]
    engine.submit(request("c", min_tokens=20))
    assert lengths(engine.step()) == [("a", 1), ("b", 2), ("c", 3)]
    assert lengths(engine.step()) == [("a", 1), ("b", 1), ("c", 1)]


def test_no_token_is_sampled_before_the_prompt_is_complete() -> None:
    engine = FakeEngine(Limits(max_batched_tokens=2))
    engine.submit(request(prompt=(5, 6, 7), min_tokens=20))
    assert [chunk.samples for chunk in engine.step()] == [False]
    assert not engine.events["r"]
    engine.step()
    assert len(engine.events["r"]) == 1


def test_no_more_than_max_num_seqs_sequences_run() -> None:
    engine = FakeEngine(Limits(max_num_seqs=2))
    for name in "abc":
        engine.submit(request(name, min_tokens=20))
    engine.step()
    assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (2, 1)


def test_a_request_that_fits_does_not_overtake_the_first_that_waits() -> None:
    engine = FakeEngine(Limits(num_blocks=8, max_model_len=32))
    engine.submit(request("a", prompt=(5,) * 20, min_tokens=12))
    engine.submit(request("large", prompt=(6,) * 20, max_tokens=1))
    engine.submit(request("small", prompt=(7,), max_tokens=1))
    engine.step()
    assert [s.request_id for s in engine.scheduler.running] == ["a"]
    engine.finish()
    assert engine.first_runs == ["a", "large", "small"]


def test_the_youngest_is_preempted_and_later_continues_its_answer() -> None:
    limits = Limits(num_blocks=6, max_model_len=24)
    engine = FakeEngine(limits)
    engine.submit(request("old", prompt=(5,) * 8, min_tokens=12, max_tokens=12))
    young = engine.submit(request("young", prompt=(6,) * 8, min_tokens=12, max_tokens=12))
    while not engine.scheduler.preemptions:
        engine.step()
    assert young.status is SequenceStatus.WAITING
    assert young.output_length > 0
    assert (young.computed, len(young.block_table)) == (0, 0)
    assert engine.scheduler.waiting.first is young
    engine.finish()
    engine.check_answers()


def test_preemption_changes_neither_the_waiting_time_nor_the_prefix_counters() -> None:
    engine = FakeEngine(Limits(num_blocks=6, max_model_len=24))
    engine.submit(request("old", prompt=(5,) * 8, min_tokens=12, max_tokens=12))
    engine.submit(request("young", prompt=(6,) * 8, min_tokens=12, max_tokens=12))
    engine.finish()
    assert engine.scheduler.preemptions
    assert {event.cached_tokens for event in engine.events["young"]} == {0}
    assert len({event.queue_seconds for event in engine.events["young"]}) == 1
    assert engine.scheduler.prefix_queried_tokens == 16
    assert engine.scheduler.prefix_hit_tokens == 0


def test_a_token_budget_smaller_than_the_decodes_serves_the_oldest() -> None:
    engine = FakeEngine(Limits(max_batched_tokens=1))
    engine.submit(request("a", prompt=(5,), min_tokens=3, max_tokens=3))
    engine.submit(request("b", prompt=(5,), min_tokens=3, max_tokens=3))
    assert [lengths(engine.step()) for _ in range(6)] == [[("a", 1)]] * 3 + [[("b", 1)]] * 3


# --- Ends ---------------------------------------------------------------------------------------


def event_of_first_token(sampled: int, req: EngineRequest) -> TokenEvent:
    """Returns the event of a request whose first token is `sampled`."""
    scheduler = Limits().scheduler()
    sequence = Sequence(req)
    scheduler.add(sequence)
    (event,) = scheduler.update(scheduler.schedule(), {sequence: (sampled, None)})
    return event


def test_a_stop_token_ends_the_answer_and_is_in_the_terminal_event() -> None:
    event = event_of_first_token(EOS, request())
    assert (event.token_id, event.finish_reason) == (EOS, FinishReason.STOP)


def test_an_ordinary_token_does_not_end_the_answer() -> None:
    assert event_of_first_token(9, request()).finish_reason is None


def test_max_tokens_ends_the_answer() -> None:
    assert event_of_first_token(9, request(max_tokens=1)).finish_reason is FinishReason.LENGTH


def test_a_stop_token_at_max_tokens_is_a_stop() -> None:
    assert event_of_first_token(EOS, request(max_tokens=1)).finish_reason is FinishReason.STOP


def test_an_answer_ends_at_a_full_context_before_max_tokens() -> None:
    engine = FakeEngine(Limits(max_model_len=10))
    engine.submit(request(prompt=(5, 6, 7), max_tokens=1000, min_tokens=1000))
    engine.finish()
    assert len(engine.tokens("r")) == 7
    assert engine.events["r"][-1].finish_reason is FinishReason.LENGTH


def test_an_abort_frees_the_blocks_at_once_and_ends_once() -> None:
    engine = FakeEngine(Limits())
    engine.submit(request(min_tokens=20))
    engine.step()
    event = engine.scheduler.abort("r")
    assert event is not None
    assert (event.token_id, event.finish_reason) == (None, FinishReason.ABORT)
    assert engine.scheduler.blocks.referenced == 0
    assert engine.scheduler.abort("r") is None
    assert engine.scheduler.abort("never seen") is None


def test_a_failed_sequence_reports_its_error_and_the_others_continue() -> None:
    engine = FakeEngine(Limits())
    broken = engine.submit(request("broken", min_tokens=20))
    engine.submit(request("sound", max_tokens=5))
    engine.step()
    event = engine.scheduler.fail(broken, "no such luck")
    assert (event.finish_reason, event.error) == (FinishReason.ERROR, "no such luck")
    engine.take([event])
    engine.finish()
    engine.check_answers()


def test_a_sequence_aborted_during_its_step_gets_no_second_event() -> None:
    engine = FakeEngine(Limits())
    engine.submit(request("gone", min_tokens=20))
    engine.submit(request("there", min_tokens=20))
    engine.before_update = lambda engine, chunks: engine.abort("gone")
    engine.step()
    assert len(engine.events["gone"]) == 1
    assert len(engine.tokens("there")) == 1


def test_events_report_the_waiting_time_and_the_reasoning_tokens() -> None:
    engine = FakeEngine(Limits(max_num_seqs=1))
    engine.submit(request("first", min_tokens=3, max_tokens=3))
    second = engine.submit(
        request("second", think=ThinkPolicy(THINK, END_THINK, opened_by_prompt=True), min_tokens=3)
    )
    engine.finish()
    assert second.first_scheduled is not None
    waited = second.first_scheduled - second.arrival
    assert waited > 0
    assert {event.queue_seconds for event in engine.events["second"]} == {waited}
    assert second.thinking is not None
    assert engine.events["second"][-1].reasoning_tokens == second.thinking.reasoning_tokens > 0


# --- Steps in flight ----------------------------------------------------------------------------

AHEAD = Limits(asynchronous=True)


def test_a_step_is_scheduled_before_the_tokens_of_the_previous_one_are_known() -> None:
    scheduler, sequence = Limits().scheduler(), Sequence(request(max_tokens=9))
    scheduler.add(sequence)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [(chunk.start, chunk.length, is_known(chunk)) for chunk in first + second] == [
        (0, 3, True),
        (3, 1, False),
    ]
    for chunks, token in ((first, 8), (second, 9)):
        (event,) = scheduler.update(chunks, {sequence: (token, None)})
        assert event.token_id == token
    assert (sequence.tokens[-2:], sequence.in_flight) == ([8, 9], 0)
    scheduler.check_integrity()


def test_a_row_computed_after_an_end_token_has_no_event_and_is_not_cached() -> None:
    scheduler, sequence = Limits(block_size=1).scheduler(), Sequence(request())
    scheduler.add(sequence)
    first, superfluous = scheduler.schedule(), scheduler.schedule()
    (event,) = scheduler.update(first, {sequence: (EOS, None)})
    assert event.finish_reason is FinishReason.STOP
    assert scheduler.blocks.referenced == 0
    assert scheduler.update(superfluous, {}) == []
    assert scheduler.blocks.cached == 3  # of the prompt, without the end token
    scheduler.check_integrity()


@pytest.mark.parametrize("limits", [Limits(), AHEAD], ids=["one by one", "ahead"])
@pytest.mark.parametrize(
    ("params", "rows"), [({"max_tokens": 4}, 6), ({"max_tokens": 0}, 3), ({}, 9)], ids=str
)
def test_no_row_is_computed_after_a_predictable_end(
    limits: Limits, params: dict[str, int], rows: int
) -> None:
    engine = FakeEngine(replace(limits, max_model_len=10))
    engine.submit(request(min_tokens=99, **params))
    computed = 0
    while engine.scheduler.unfinished:
        computed += sum(chunk.length for chunk in engine.step())
    assert computed == rows


def test_no_sequence_is_preempted_for_a_sequence_that_waits_for_its_token() -> None:
    scheduler = Limits(num_blocks=4, max_model_len=16).scheduler()
    old, young = Sequence(request("old", (5,) * 4)), Sequence(request("young", (6,) * 4))
    scheduler.add(old)
    scheduler.add(young)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert lengths(second) == [("old", 1), ("young", 1)]
    scheduler.update(first, {old: (9, None), young: (9, None)})
    for _ in range(3):
        third = scheduler.schedule()
        scheduler.update(second, {old: (9, None), young: (9, None)})
        second = third
    assert lengths(second) == [("old", 1), ("young", 1)]  # both blocks are full
    assert scheduler.schedule() == []
    assert not scheduler.preemptions
    scheduler.update(second, {old: (9, None), young: (9, None)})
    assert lengths(scheduler.schedule()) == [("old", 1)]
    assert scheduler.preemptions == 1


def test_a_preempted_sequence_still_gets_the_token_in_flight() -> None:
    scheduler = Limits(num_blocks=4, max_model_len=16).scheduler()
    old, young = Sequence(request("old", (5,) * 4)), Sequence(request("young", (6,) * 4))
    scheduler.add(old)
    scheduler.update(scheduler.schedule(), {old: (9, None)})
    scheduler.add(young)
    step = scheduler.schedule()
    assert lengths(step) == [("old", 1), ("young", 4)]
    scheduler._preempt(young)
    assert lengths(scheduler.schedule()) == [
        ("old", 1)
    ]  # young would fit, but its token is in flight
    events = scheduler.update(step, {old: (9, None), young: (8, None)})
    assert [event.token_id for event in events] == [9, 8]
    assert young.status is SequenceStatus.WAITING
    assert young.tokens[young.prompt_length :] == [8]
    assert lengths(scheduler.schedule()) == [("old", 1), ("young", 5)]
    scheduler.check_integrity()


def test_only_a_sequence_whose_dial_may_switch_waits_for_its_token() -> None:
    engine, think = FakeEngine(AHEAD), ThinkPolicy(THINK, END_THINK, opened_by_prompt=True)
    engine.submit(request("switches", think=think, answer_dial=0.1, min_tokens=30))
    engine.submit(request("thinks", think=think, min_tokens=30))
    engine.submit(request("does not", answer_dial=0.1, min_tokens=30))
    ran = Counter(chunk.sequence.request_id for _ in range(8) for chunk in engine.step())
    assert ran == {"switches": 4, "thinks": 8, "does not": 8}


# --- Priority -----------------------------------------------------------------------------------


def test_waiting_requests_run_by_priority_then_by_arrival() -> None:
    engine = FakeEngine(Limits(max_num_seqs=1))
    for name, priority in [("a", 0), ("b", 5), ("c", -5), ("d", 0), ("e", -5)]:
        engine.submit(request(name, max_tokens=1, priority=priority))
    engine.finish()
    assert engine.first_runs == ["c", "e", "a", "d", "b"]


def test_the_lowest_priority_is_preempted_even_if_it_is_older() -> None:
    engine = FakeEngine(Limits(num_blocks=6, max_model_len=24))
    old = engine.submit(request("old", prompt=(5,) * 8, min_tokens=12, max_tokens=12, priority=1))
    engine.submit(request("young", prompt=(6,) * 8, min_tokens=12, max_tokens=12))
    while not engine.scheduler.preemptions:
        engine.step()
    assert old.status is SequenceStatus.WAITING
    engine.finish()
    engine.check_answers()


def test_no_sequence_is_preempted_for_a_waiting_request() -> None:
    engine = FakeEngine(Limits(max_num_seqs=1))
    engine.submit(request("running", min_tokens=5, max_tokens=5, priority=9))
    engine.step()
    engine.submit(request("urgent", max_tokens=1, priority=-9))
    engine.finish()
    assert engine.scheduler.preemptions == 0
    assert engine.first_runs == ["running", "urgent"]


# --- Log-probabilities of the prompt ------------------------------------------------------------


def test_with_max_tokens_0_the_only_event_has_the_prompts_scores() -> None:
    engine = FakeEngine(Limits(max_batched_tokens=4))
    engine.submit(request("r", PROMPT, max_tokens=0, prompt_logprobs=1))
    engine.finish()
    (event,) = engine.events["r"]
    assert (event.token_id, event.finish_reason) == (None, FinishReason.LENGTH)
    assert event.prompt_logprobs == scores_alone(engine.requests["r"])
    assert len(event.prompt_logprobs) == len(PROMPT) - 1


def test_a_prompt_of_one_token_has_no_scores() -> None:
    engine = FakeEngine(Limits())
    engine.submit(request("r", (5,), max_tokens=0, prompt_logprobs=1))
    engine.finish()
    assert engine.events["r"][0].prompt_logprobs == ()


def test_a_scored_prompt_uses_no_cached_kv_but_caches_its_own() -> None:
    engine = FakeEngine(Limits())
    for name, scores in [("a", None), ("b", 1), ("c", None)]:
        engine.submit(request(name, PROMPT, max_tokens=1, prompt_logprobs=scores))
        engine.finish()
    assert [engine.events[name][0].cached_tokens for name in "abc"] == [0, 0, 12]
    engine.check_answers()


def test_a_step_scores_a_bounded_number_of_positions_and_others_use_the_rest() -> None:
    length = SCORED_ROWS + 100
    engine = FakeEngine(
        Limits(num_blocks=500, max_model_len=length + 9, max_batched_tokens=4 * SCORED_ROWS)
    )
    for name, scores in [("long", 0), ("next", 0), ("plain", None)]:
        engine.submit(request(name, (5,) * length, max_tokens=1, prompt_logprobs=scores))
    assert lengths(engine.step()) == [("long", SCORED_ROWS), ("plain", length)]
    engine.finish()
    engine.check_answers()


def test_a_preempted_prompt_continues_its_scores() -> None:
    engine = FakeEngine(Limits(num_blocks=6, max_model_len=24, max_batched_tokens=3))
    engine.submit(request("first", (5,) * 4, min_tokens=20, max_tokens=20))
    scored = engine.submit(request("scored", (6,) * 14, max_tokens=2, prompt_logprobs=0))
    while not engine.scheduler.preemptions:
        engine.step()
    known = len(scored.prompt_logprobs)
    assert 0 < known < 13
    engine.finish()
    engine.check_answers()


# --- The prefix cache ---------------------------------------------------------------------------

PROMPT = tuple(range(5, 18))  # 13 tokens: three full blocks of four, and one token


def cached_tokens(first: EngineRequest, second: EngineRequest, limits: Limits | None = None) -> int:
    """Returns how many tokens of `second` are found in the cache after `first` has run."""
    engine = FakeEngine(limits or Limits())
    engine.submit(first)
    engine.step()
    sequence = engine.submit(second)
    engine.step()
    others = [other for other in engine.scheduler.running if other is not sequence]
    held = {block for other in others for block in other.block_table}
    shared = held & set(sequence.block_table)
    assert len(shared) * engine.limits.block_size == sequence.cached_tokens
    assert engine.scheduler.prefix_hit_tokens == sequence.cached_tokens
    engine.finish()
    engine.check_answers()
    return sequence.cached_tokens


def test_the_same_prompt_under_one_dial_shares_its_full_blocks() -> None:
    assert cached_tokens(request("a", PROMPT, min_tokens=9), request("b", PROMPT)) == 12


def test_the_same_prompt_under_another_dial_shares_nothing() -> None:
    first = request("a", PROMPT, dial=0.5, min_tokens=9)
    assert cached_tokens(first, request("b", PROMPT, dial=0.51)) == 0


def test_the_same_prompt_under_another_salt_shares_nothing() -> None:
    first = request("a", PROMPT, min_tokens=9)
    assert cached_tokens(first, request("b", PROMPT, salt="other")) == 0


def test_only_the_common_prefix_is_shared() -> None:
    first = request("a", PROMPT, min_tokens=9)
    assert cached_tokens(first, request("b", (*PROMPT[:6], 30, *PROMPT[7:]))) == 4


def test_at_least_one_token_of_a_cached_prompt_is_computed() -> None:
    first = request("a", PROMPT[:12], min_tokens=9)
    assert cached_tokens(first, request("b", PROMPT[:12])) == 8


def test_nothing_is_shared_with_prefix_caching_off() -> None:
    first = request("a", PROMPT, min_tokens=9)
    off = Limits(prefix_caching=False)
    assert cached_tokens(first, request("b", PROMPT), off) == 0


def test_an_answer_is_found_again_as_the_prompt_of_the_next_turn() -> None:
    engine = FakeEngine(Limits())
    first = engine.submit(request("a", PROMPT, min_tokens=12, max_tokens=12))
    engine.finish()
    second = engine.submit(request("b", tuple(first.tokens), max_tokens=1))
    engine.step()
    assert second.cached_tokens == 24  # 25 tokens, the last of them never computed
    engine.check_answers()


def test_two_sequences_that_compute_one_block_at_once_keep_their_own() -> None:
    engine = FakeEngine(Limits())
    for name in "ab":
        engine.submit(request(name, PROMPT, min_tokens=9, max_tokens=9))
    engine.step()
    tables = [set(sequence.block_table) for sequence in engine.scheduler.running]
    assert not tables[0] & tables[1]
    engine.finish()
    engine.check_answers()
    assert engine.scheduler.blocks.cached == 5  # 21 computed tokens, once


# --- Gauges -------------------------------------------------------------------------------------


def test_the_queues_list_their_distinct_lambdas() -> None:
    engine = FakeEngine(Limits(max_num_seqs=2))
    for name, dial in [("a", 0.9), ("b", 0.1), ("c", 0.1), ("d", 0.1)]:
        engine.submit(request(name, dial=dial, min_tokens=9))
    engine.step()
    assert list(engine.scheduler.running.lambdas) == [0.1, 0.9]
    assert list(engine.scheduler.waiting.lambdas) == [0.1]
    engine.abort("b")
    assert list(engine.scheduler.running.lambdas) == [0.9]


# --- Random workloads ---------------------------------------------------------------------------

TINY = {
    "roomy": Limits(),
    "no cache": Limits(prefix_caching=False, num_blocks=16),
    "few blocks": Limits(num_blocks=16, max_batched_tokens=32),
    "few tokens a step": Limits(num_blocks=24, max_batched_tokens=5),
    "one token a step": Limits(num_blocks=16, max_batched_tokens=1),
    "one sequence": Limits(num_blocks=16, max_num_seqs=1, max_batched_tokens=7),
    "blocks of one token": Limits(num_blocks=70, block_size=1, max_batched_tokens=16),
    "blocks of many tokens": Limits(num_blocks=4, block_size=16, max_batched_tokens=24),
}


THOUGHTS = [
    None,
    ThinkPolicy(THINK, END_THINK),
    ThinkPolicy(THINK, END_THINK, opened_by_prompt=True),
    ThinkPolicy(THINK, END_THINK, opened_by_prompt=True, cap=5, closing=(7, END_THINK, 8)),
]


def random_request(rng: random.Random, request_id: str, limits: Limits) -> EngineRequest:
    """Returns a request whose prompt begins as one of three texts, to share prefixes."""
    text = random.Random(rng.randrange(3)).choices(range(3, VOCAB), k=limits.max_model_len - 1)
    tail = rng.choices(range(3, VOCAB), k=rng.choice([0, 0, 1, 5]))
    prompt = (*text[: rng.randint(1, limits.max_model_len // 2)], *tail)
    return request(
        request_id,
        prompt[: limits.max_model_len - 1],
        dial=rng.choice([0.0, 0.5, 1.0]),
        salt=rng.choice(["", "", "", "s"]),
        max_tokens=rng.choice([None, 0, 1, 4, 30]),
        min_tokens=rng.choice([0, 0, 10]),
        seed=rng.choice([0, 1]),
        prompt_logprobs=rng.choice([None, None, 0]),
        priority=rng.choice([0, 0, 0, 1, -1]),
        think=rng.choice(THOUGHTS),
        answer_dial=rng.choice([None, None, 0.25]),
    )


def abort_one(rng: random.Random, engine: FakeEngine) -> None:
    """Aborts one of the last requests, in any state."""
    engine.abort(rng.choice(list(engine.requests)[-12:]))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["one by one", "ahead"])
@pytest.mark.parametrize("limits", TINY.values(), ids=TINY.keys())
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_random_workload_gives_every_request_what_it_gets_alone(
    limits: Limits, seed: int, asynchronous: bool
) -> None:
    rng, limits = random.Random(seed), replace(limits, asynchronous=asynchronous)

    def abort_in_flight(engine: FakeEngine, chunks: list[Chunk]) -> None:
        if chunks and rng.random() < 0.03:
            engine.abort(rng.choice(chunks).sequence.request_id)

    engine = FakeEngine(limits, abort_in_flight)
    while engine.steps < 1000:
        if engine.scheduler.unfinished < 12 and rng.random() < 0.4:
            engine.submit(random_request(rng, str(len(engine.requests)), limits))
        if engine.requests and rng.random() < 0.04:
            abort_one(rng, engine)
        engine.step()
    engine.finish()
    engine.check_answers()
    engine.check_order()
    assert bool(engine.scheduler.prefix_hit_tokens) == limits.prefix_caching
    assert bool(engine.ran_ahead) == bool(engine.held_back) == asynchronous


def test_random_workloads_reach_every_path() -> None:
    """Shows that workloads like those above preempt, and abort in every state."""
    rng, aborted = random.Random(7), Counter[str]()
    engine = FakeEngine(Limits(num_blocks=16, max_batched_tokens=10))
    for _ in range(1000):
        if engine.scheduler.unfinished < 12:
            engine.submit(random_request(rng, str(len(engine.requests)), engine.limits))
        if rng.random() < 0.1:
            victim = rng.choice([*engine.scheduler.running, *engine.scheduler.waiting])
            aborted[state_of(victim)] += 1
            engine.abort(victim.request_id)
        engine.step()
    engine.finish()
    engine.check_answers()
    assert engine.scheduler.preemptions > 20
    assert set(aborted) == {"waiting", "preempted", "prefilling", "decoding"}


def state_of(sequence: Sequence) -> str:
    if sequence.status is SequenceStatus.RUNNING:
        return "decoding" if sequence.remaining == 1 else "prefilling"
    return "preempted" if sequence.output_length else "waiting"


@st.composite
def small_limits(draw: st.DrawFn) -> Limits:
    block_size, num_blocks = draw(st.integers(1, 5)), draw(st.integers(3, 10))
    return Limits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=draw(st.integers(3, min(num_blocks * block_size, 24))),
        max_num_seqs=draw(st.integers(1, 4)),
        max_batched_tokens=draw(st.integers(1, 12)),
        prefix_caching=draw(st.booleans()),
        asynchronous=draw(st.booleans()),
    )


@st.composite
def small_requests(draw: st.DrawFn, request_id: str, limits: Limits) -> EngineRequest:
    prompts = st.lists(st.integers(3, 4), min_size=1, max_size=limits.max_model_len - 1)
    return request(
        request_id,
        tuple(draw(prompts)),
        dial=draw(st.sampled_from([0.0, 1.0])),
        salt=draw(st.sampled_from(["", "s"])),
        max_tokens=draw(st.none() | st.integers(0, 8)),
        min_tokens=draw(st.integers(0, 8)),
        seed=draw(st.integers(0, 1)),
        prompt_logprobs=draw(st.none() | st.just(0)),
        priority=draw(st.integers(-1, 1)),
    )


@settings(max_examples=2 * settings.default.max_examples)
@given(st.data())
def test_any_workload_under_any_limits_gives_every_request_what_it_gets_alone(
    data: st.DataObject,
) -> None:
    limits = data.draw(small_limits())
    engine = FakeEngine(limits)
    for move in data.draw(st.lists(st.sampled_from(["submit", "step", "step", "abort"]))):
        if move == "submit":
            engine.submit(data.draw(small_requests(str(len(engine.requests)), limits)))
        elif move == "step":
            engine.step()
        elif engine.requests:
            engine.abort(data.draw(st.sampled_from(list(engine.requests))))
    engine.finish()
    engine.check_answers()
    engine.check_order()
