"""The scheduler chooses what the next step computes, and takes in what was sampled.

Continuous batching: a step is one flat batch of chunks, decodes first, then prefill within what
remains of the token budget. Sequences are ranked by priority and, if that is equal, by arrival. The
first waiting sequence is admitted first and never overtaken by the others. When blocks run out, the
last running sequence is preempted: it returns to the waiting queue, its KV is dropped (to be
recomputed, or found again in the prefix cache) and its tokens are kept. So the first running
sequence always advances, and sequences of equal priority cannot starve. An operator who
lets callers set priorities lets them keep others waiting. A waiting sequence of better rank takes
the next free place; no running sequence is preempted for it.

A request for log-probabilities of its prompt needs logits, as wide as the vocabulary, at every
prompt position. A step computes at most `SCORED_ROWS` of them, and no prefix is taken from the
cache beyond the positions that are already scored.

Admission allocates the blocks of all known tokens at once; after that a sequence needs a block only
when its answer grows into one.

A step may be scheduled while the previous one is in flight, that is, launched but without results.
The tokens that the previous step samples are then counted but not known. A sequence is scheduled
before its token is known, unless the answer certainly ends with it, or it may close a think block
after which another dial applies. Such a sequence skips one step, and its place in the budget stays
free. If the token ends the answer after all, what was computed after it is dropped. No sequence is
preempted for a token that is not known yet. A preempted sequence still takes the token that was
being sampled for it, and is not admitted again before that.

The chunks that `schedule` returns count as computed at once, because later steps run after them on
the device. The prefix cache takes a block only when its step has succeeded and all of its tokens
are known.

The scheduler knows token ids and block numbers, no tensors and no text.
"""

import itertools
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from mi_runtime.request import (
    EngineRequest,
    FinishReason,
    RequestRejected,
    TokenEvent,
    TokenLogprobs,
)
from mi_runtime.scheduling.block_pool import BlockPool
from mi_runtime.scheduling.chunk import Chunk, Sampled
from mi_runtime.scheduling.request_queue import RequestQueue
from mi_runtime.scheduling.sequence import Sequence, SequenceStatus

SCORED_ROWS: Final = 512
"""Most prompt positions with logits in a step: 300 MB with a vocabulary of 150,000 in fp32."""


class Scheduler:
    """Schedules the running and waiting sequences of one engine, and gives them KV blocks.

    `max_model_len` limits the tokens of a prompt and its answer together, `max_batched_tokens` the
    tokens of a step, and `max_num_seqs` the sequences that run at once.
    """

    def __init__(
        self,
        blocks: BlockPool,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        assert max_model_len <= blocks.num_blocks * blocks.block_size, "one sequence must fit"
        assert max_num_seqs > 0
        assert max_batched_tokens > 0
        self.blocks = blocks
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.prefix_caching = prefix_caching
        self._arrivals = itertools.count()
        self.running = RequestQueue()
        self.waiting = RequestQueue()
        self.prefix_queried_tokens = 0  # prompt tokens looked up, once per request
        self.prefix_hit_tokens = 0
        self.preemptions = 0
        self.forced_closes = 0

    @property
    def unfinished(self) -> int:
        """Sequences that have not ended."""
        return len(self.running) + len(self.waiting)

    def check_request(self, request: EngineRequest) -> None:
        """Checks that the request can be computed.

        Raises RequestRejected, with `param`, and with `code` for a prompt that is too long.
        """
        if self._find(request.request_id) is not None:
            raise RequestRejected(
                f"request id {request.request_id!r} is in use", param="request_id"
            )
        self._check_prompt(request.prompt)
        max_tokens = request.sampling.max_tokens
        if max_tokens is not None and max_tokens < 0:
            raise RequestRejected(
                f"max_tokens must not be negative: {max_tokens}", param="max_tokens"
            )
        for token_id, _ in request.sampling.logit_bias:
            self._check_token(token_id, "logit_bias")

    def add(self, sequence: Sequence) -> None:
        """Adds the sequence of a checked request to the waiting queue."""
        assert self._find(sequence.request_id) is None
        assert 0 < len(sequence) < self.max_model_len
        sequence.rank = (sequence.request.priority, next(self._arrivals))
        self.waiting.add(sequence)

    def abort(self, request_id: str) -> TokenEvent | None:
        """Ends a request for its caller; returns None if it is unknown or has ended."""
        sequence = self._find(request_id)
        if sequence is None:
            return None
        return self._end(sequence, FinishReason.ABORT)

    def fail(self, sequence: Sequence, message: str) -> TokenEvent:
        """Ends one request that cannot be computed, and makes its KV unavailable to others."""
        self.blocks.forget(sequence.block_table)
        return self._end(sequence, FinishReason.ERROR, message)

    def complete(self, sequence: Sequence) -> TokenEvent:
        """Ends a request whose grammar allows no token after the last one."""
        return self._end(sequence, FinishReason.COMPLETE)

    def schedule(self) -> list[Chunk]:
        """Returns the chunks of the next step.

        It is empty only if no request is unfinished, or all wait for the step in flight.
        """
        chunks = self._decodes()
        prefilling = [sequence for sequence in self.running if sequence.remaining > 1]
        decoding = len(self.running) - len(prefilling)  # or about to decode
        budget, scored_rows = self.max_batched_tokens - decoding, SCORED_ROWS
        prefills = self._prefills(prefilling)
        while budget > 0 and (sequence := next(prefills, None)) is not None:
            length = min(budget, sequence.remaining)
            chunk = _within(scored_rows, Chunk(sequence, sequence.computed, length))
            if chunk.length:
                chunks.append(chunk)
                budget -= chunk.length
                scored_rows -= len(chunk.scored)
        for chunk in chunks:
            chunk.sequence.computed += chunk.length
            chunk.sequence.in_flight += 1
        queue = self.running or self.waiting
        assert chunks or not queue or queue.first.in_flight, "the scheduler is stuck"
        return chunks

    def update(
        self,
        chunks: list[Chunk],
        sampled: Mapping[Sequence, Sampled | None],
        scores: Mapping[Sequence, list[TokenLogprobs] | None] | None = None,
    ) -> list[TokenEvent]:
        """Takes the results of a step, and returns one event per sampled token.

        `sampled` holds the token of each chunk that samples, and `scores` the log-probabilities of
        each chunk's `scored` positions. A sequence that ended after `schedule` has already had its
        terminal event: its results are dropped, and only they may be None.
        """
        unfinished = [chunk for chunk in chunks if not chunk.sequence.ended]
        for chunk in chunks:
            chunk.sequence.in_flight -= 1
        for chunk in unfinished:
            if chunk.scored:
                assert chunk.scored.start == chunk.sequence.unscored.start
                chunk.sequence.prompt_logprobs += (scores or {})[chunk.sequence] or ()
            if chunk.sequence.status is SequenceStatus.RUNNING:
                self._register(chunk)
        sampling = [chunk.sequence for chunk in unfinished if chunk.samples]
        return [self._extend(one, sampled[one]) for one in sampling]

    def check_integrity(self) -> None:
        """Asserts every invariant of scheduler and blocks, in O(blocks + sequences)."""
        self.blocks.check_integrity()
        held = Counter(block for sequence in self.running for block in sequence.block_table)
        for block in range(self.blocks.num_blocks):
            assert self.blocks.reference_count(block) == held[block], f"block {block} leaks"
        assert len(self.running) <= self.max_num_seqs
        for sequence in self.running:
            self._check_running(sequence)
        for sequence in self.waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.block_table
            assert not sequence.computed
        for queue in (self.running, self.waiting):
            assert queue.lambdas == tuple(sorted({s.request.dial.reasoning_lambda for s in queue}))
            assert [*queue] == sorted(queue, key=lambda one: one.rank)

    # --- Choosing a step ------------------------------------------------------------------------

    def _decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):  # by rank; preemption takes the last one
            if len(chunks) == self.max_batched_tokens:
                break
            if sequence.remaining <= 1 and self._may_run(sequence) and self._grow(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1))
        return chunks

    def _may_run(self, sequence: Sequence) -> bool:
        """Whether the next token is known, or the step does not depend on which one it is."""
        length = len(sequence.tokens)
        if sequence.computed < length:
            return True
        is_last = length + 1 >= min(self.max_model_len, sequence.max_length)
        return not is_last and not sequence.may_switch

    def _grow(self, sequence: Sequence) -> bool:
        """Makes room for one more token, and returns whether the sequence may run.

        It may not if it was preempted, or if it would preempt others for an unknown token.
        """
        if len(sequence.block_table) * self.blocks.block_size > sequence.computed:
            return True
        if sequence.awaits_token and not self.blocks.available:
            return False
        while sequence.status is SequenceStatus.RUNNING and not self.blocks.available:
            self._preempt(self.running.last)
        if sequence.status is SequenceStatus.RUNNING:
            sequence.block_table.append(self.blocks.allocate())
        return sequence.status is SequenceStatus.RUNNING

    def _preempt(self, sequence: Sequence) -> None:
        self._drop_blocks(sequence)
        self.running.remove(sequence)
        self.waiting.add(sequence)
        sequence.status = SequenceStatus.WAITING
        self.preemptions += 1

    def _prefills(self, prefilling: list[Sequence]) -> Iterator[Sequence]:
        """Yields the running sequences in prefill, then waiting ones, admitting each in turn."""
        yield from prefilling
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.first
            if not self._admit(sequence):
                return
            yield sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Allocates the blocks of a waiting sequence's known tokens and makes it running.

        Returns False if they do not fit, or if a step in flight still samples its token.
        """
        if sequence.in_flight:
            return False
        found = self._cached_prefix(sequence)
        fresh = self.blocks.blocks_for(len(sequence)) - len(found)
        block_table = self.blocks.acquire(found, fresh)
        if block_table is None:
            return False
        sequence.block_table = array("i", block_table)
        sequence.computed = len(found) * self.blocks.block_size
        sequence.status = SequenceStatus.RUNNING
        self.waiting.remove(sequence)
        self.running.add(sequence)
        if sequence.first_scheduled is None:
            self._note_first_scheduled(sequence)
        return True

    def _note_first_scheduled(self, sequence: Sequence) -> None:
        sequence.first_scheduled = time.monotonic()
        sequence.queue_seconds = sequence.first_scheduled - sequence.arrival
        sequence.cached_tokens = sequence.computed
        if self.prefix_caching and not sequence.unscored:
            self.prefix_queried_tokens += sequence.prompt_length
            self.prefix_hit_tokens += sequence.cached_tokens

    # --- The prefix cache -----------------------------------------------------------------------

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Returns the cached blocks of the sequence's prefix, less what must be computed."""
        found: list[int] = []
        if not self.prefix_caching:
            return found
        reusable = sequence.unscored.start if sequence.unscored else len(sequence) - 1
        for index in range(reusable // self.blocks.block_size):
            block = self.blocks.find(self._block_key(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def _block_key(self, sequence: Sequence, index: int) -> bytes:
        """Returns the key of a full block.

        Calls come in order of `index`; keys are stored, since known tokens never change.
        """
        keys, size = sequence.block_keys, self.blocks.block_size
        if not keys:
            keys.append(self.blocks.root_key(sequence.request.dial, sequence.request.cache_salt))
        if len(keys) == index + 1:
            start, end = index * size, (index + 1) * size
            switch = sequence.switch_at
            switched = None
            if switch is not None and switch < end:  # it holds KV computed under the answer's dial
                switched = (sequence.dial_at(end), max(0, switch - start))
            keys.append(self.blocks.next_key(keys[index], sequence.tokens[start:end], switched))
        return keys[index + 1]

    # --- Taking a step's results ----------------------------------------------------------------

    def _register(self, chunk: Chunk) -> None:
        """Adds the blocks that the chunk has filled to the prefix cache."""
        sequence, size = chunk.sequence, self.blocks.block_size
        if self.prefix_caching:
            for index in range(chunk.start // size, (chunk.start + chunk.length) // size):
                key = self._block_key(sequence, index)
                self.blocks.register(sequence.block_table[index], key)

    def _extend(self, sequence: Sequence, sampled: Sampled | None) -> TokenEvent:
        assert sampled is not None
        token_id, logprobs = sampled
        if sequence.request.sampling.max_tokens == 0:  # the sampled token is not wanted
            return self._end(sequence, FinishReason.LENGTH)
        sequence.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        if reason is not None:
            self._leave(sequence)
        error = None if sequence.grammar is None else sequence.grammar.failure
        return _event(sequence, token_id, reason, logprobs, error)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        grammar = sequence.grammar
        if grammar is not None and grammar.failure is not None:
            return FinishReason.ERROR
        if token_id in sequence.ending_token_ids:
            return FinishReason.STOP
        if grammar is not None and grammar.complete:
            return FinishReason.COMPLETE
        length = len(sequence.tokens)
        is_full = length == self.max_model_len or length == sequence.max_length
        return FinishReason.LENGTH if is_full else None

    # --- Ends -----------------------------------------------------------------------------------

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None
    ) -> TokenEvent:
        self._leave(sequence)
        return _event(sequence, token_id=None, finish_reason=reason, error=error)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.status is not SequenceStatus.ENDED
        queue = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        queue.remove(sequence)
        self._drop_blocks(sequence)
        sequence.status = SequenceStatus.ENDED
        self.forced_closes += sequence.forced_close

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = array("i")
        sequence.computed = 0

    # --- Checks ---------------------------------------------------------------------------------

    def _find(self, request_id: str) -> Sequence | None:
        return self.running.get(request_id) or self.waiting.get(request_id)

    def _check_prompt(self, prompt: tuple[int, ...]) -> None:
        if not prompt:
            raise RequestRejected("the prompt is empty", param="prompt")
        if len(prompt) + 1 > self.max_model_len:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens, and the context holds {self.max_model_len} "
                "for prompt and answer together",
                param="prompt",
                code="context_length_exceeded",
            )
        for token_id in (min(prompt), max(prompt)):
            self._check_token(token_id, "prompt")

    def _check_token(self, token_id: int, param: str) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RequestRejected(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size}", param=param
            )

    def _check_running(self, sequence: Sequence) -> None:
        assert sequence.status is SequenceStatus.RUNNING
        assert 0 < len(sequence) < self.max_model_len
        assert 0 <= sequence.computed < len(sequence) + sequence.in_flight
        scored = not sequence.unscored or sequence.computed <= sequence.unscored.start
        assert scored or sequence.in_flight
        assert len(sequence.block_table) * self.blocks.block_size >= sequence.computed
        assert len(set(sequence.block_table)) == len(sequence.block_table)


def _within(scored_rows: int, chunk: Chunk) -> Chunk:
    """Returns the start of the chunk that has at most `scored_rows` scored positions."""
    scored = chunk.scored
    if len(scored) <= scored_rows:
        return chunk
    return Chunk(chunk.sequence, chunk.start, scored.start + scored_rows - chunk.start)


def _first_event_scores(
    sequence: Sequence, reason: FinishReason | None
) -> tuple[TokenLogprobs, ...] | None:
    """Returns the prompt's log-probabilities if this is the event that carries them.

    That is the event of the first token, or the only one if no token is wanted.
    """
    sampling = sequence.request.sampling
    if reason in (FinishReason.ABORT, FinishReason.ERROR):
        return None
    is_first = sampling.max_tokens == 0 or sequence.output_length == 1
    return tuple(sequence.prompt_logprobs) if is_first else None


def _event(
    sequence: Sequence,
    token_id: int | None,
    finish_reason: FinishReason | None,
    logprobs: TokenLogprobs | None = None,
    error: str | None = None,
) -> TokenEvent:
    thinking, scores = sequence.thinking, None
    if sequence.request.sampling.prompt_logprobs is not None:
        scores = _first_event_scores(sequence, finish_reason)
    return TokenEvent(
        sequence.request.request_id,
        token_id,
        finish_reason,
        logprobs,
        cached_tokens=sequence.cached_tokens,
        reasoning_tokens=0 if thinking is None else thinking.reasoning_tokens,
        forced_close=False if thinking is None else thinking.forced_close,
        phase=0 if thinking is None else int(thinking.phase),
        queue_seconds=sequence.queue_seconds,
        error=error,
        prompt_logprobs=scores,
    )
