"""The engine: it takes requests and returns token events, one step at a time.

It works with token ids only.
"""

from collections.abc import Iterable

import torch

from mi_runtime.config import EngineConfig
from mi_runtime.execution.in_flight_step import InFlightStep
from mi_runtime.execution.startup import start_runner
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import check_pair, fingerprint
from mi_runtime.model.row_lambdas import Way
from mi_runtime.request import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    RequestRejected,
    TokenEvent,
)
from mi_runtime.scheduling.block_pool import BlockPool
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.grammar import Grammars
from mi_runtime.scheduling.scheduler import Scheduler
from mi_runtime.scheduling.sequence import Sequence

GRAMMAR_WAIT = 0.02  # seconds that a step without other work waits for a grammar to compile
OUT_OF_MEMORY = "the device ran out of memory in a step that computed this request"
NOTHING_TO_SAMPLE = "no token can be sampled for this request: its logits are not finite"


class Engine:
    """A loaded pair and the requests that it is answering.

    Raises PairError if the pair cannot be served. If `model` is given, the configuration's
    endpoints, device and dtype are not used.
    """

    def __init__(self, config: EngineConfig, model: BlendedModel | None = None) -> None:
        if model is None:
            pair = check_pair(config.instruct, config.thinking)
            model = load_pair(pair, config.device, config.dtype, config.delta_dtype)
        started = start_runner(config, model)
        num_blocks = started.num_blocks
        capacity = num_blocks * config.block_size
        self.info = EngineInfo(
            pair_identity=model.identity,
            fingerprint=fingerprint(model.identity, config.lambda_step, config.delta_dtype),
            model_type=str(model.model.config.model_type),
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            delta_dtype=config.delta_dtype,
            vocab_size=model.vocab_size,
            max_model_len=min(config.max_model_len or model.max_positions, capacity),
            block_size=config.block_size,
            num_blocks=num_blocks,
            layers=len(model.layers),
            weight_bytes=model.weight_bytes,
            peak_bytes=model.peak_bytes,
            load_seconds=model.load_seconds,
            attention=started.attention,
            graphs=started.graphs,
            pair_kernels=started.pair_kernels,
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size, self.info.fingerprint),
            vocab_size=model.vocab_size,
            max_model_len=self.info.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            prefix_caching=config.prefix_caching,
        )
        self._marks = config.marks
        vocabulary = config.grammar_vocabulary
        self._grammars = None if vocabulary is None else Grammars(vocabulary)
        self._compiling: dict[str, Sequence] = {}  # sequences whose grammar is being compiled
        self._groups = model.groups
        self._runner = started.runner
        self._asynchronous = (
            model.device.type == "cuda"
            if config.async_scheduling is None
            else config.async_scheduling
        )
        self._in_flight: InFlightStep | None = None  # launched and sampled, results not taken
        self._steps = 0
        self._counted_builds = -1  # builds of blended weights when their bytes were last counted
        self._counted_bytes = 0

    @property
    def idle(self) -> bool:
        """Whether every request has ended. A step whose results nobody needs may be in flight."""
        return self.scheduler.unfinished == 0 and not self._compiling

    def submit(self, request: EngineRequest) -> None:
        """Accepts a request. Raises RequestRejected if it cannot be computed."""
        self.scheduler.check_request(request)
        if request.grammar is not None and self._grammars is None:
            raise RequestRejected(
                "this server cannot enforce formats or tools: its engine has no vocabulary for "
                "grammars",
                param="grammar",
            )
        assert request.request_id not in self._compiling
        sequence = Sequence(request, self._marks, self._grammars)
        if sequence.grammar is None or sequence.grammar.ready:
            self.scheduler.add(sequence)
        else:
            self._compiling[request.request_id] = sequence

    def abort(self, request_id: str) -> TokenEvent | None:
        """Ends a request and frees its blocks; returns None if it is unknown or has ended."""
        if self._compiling.pop(request_id, None) is not None:
            return TokenEvent(request_id, None, FinishReason.ABORT)
        return self.scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """Runs one step. At least one request advances, unless all of them wait for their grammars.

        With asynchronous scheduling, the step is launched before the results of the previous one
        are taken, and the returned events are those of the previous one.
        """
        self._add_compiled()
        chunks = self.scheduler.schedule()
        step = self._launch(chunks) if chunks else None
        events = self._take_results()
        if step is not None and self._sample(step):
            self._in_flight = step
        else:
            events += self._fail(chunks)
        return events if self._asynchronous else events + self._take_results()

    def _launch(self, chunks: list[Chunk]) -> InFlightStep | None:
        """Launches a step; returns None if the device has too little memory for it."""
        self._steps += 1
        try:
            return self._runner.launch(chunks, self._in_flight)
        except torch.OutOfMemoryError:
            return None

    def _sample(self, step: InFlightStep) -> bool:
        """Samples a launched step; returns False if the device has too little memory for it."""
        try:
            self._runner.sample(step)
        except torch.OutOfMemoryError:
            return False
        return True

    def _fail(self, chunks: list[Chunk]) -> list[TokenEvent]:
        """Ends the requests of a step that did not fit in memory, and frees what it left there."""
        if chunks:
            self._groups.end()
            torch.cuda.empty_cache()
        running = [chunk.sequence for chunk in chunks if not chunk.sequence.ended]
        return [self.scheduler.fail(sequence, OUT_OF_MEMORY) for sequence in running]

    def _take_results(self) -> list[TokenEvent]:
        """Waits for the step in flight, if any, and returns the events of its sequences."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return []
        results, events = step.results(), []
        for sequence, sampled in results.sampled.items():
            if sampled is None and not sequence.ended:
                events.append(self._end_without_token(sequence))
        for sequence, scores in results.scores.items():
            if scores is None and not sequence.ended:
                events.append(self.scheduler.fail(sequence, NOTHING_TO_SAMPLE))
        return events + self.scheduler.update(step.chunks, results.sampled, results.scores)

    def _add_compiled(self) -> None:
        """Queues the sequences whose grammars are compiled.

        It waits briefly for one if no other request is unfinished.
        """
        waiting = [(one, one.grammar) for one in self._compiling.values() if one.grammar]
        if waiting and not self.scheduler.unfinished:
            waiting[0][1].wait(GRAMMAR_WAIT)
        for sequence, grammar in waiting:
            if grammar.ready:
                del self._compiling[sequence.request_id]
                self.scheduler.add(sequence)

    def _end_without_token(self, sequence: Sequence) -> TokenEvent:
        """Ends a request for which no token could be sampled."""
        grammar = sequence.grammar
        if grammar is None or not grammar.exhausted:
            return self.scheduler.fail(sequence, NOTHING_TO_SAMPLE)
        if grammar.failure is not None:
            return self.scheduler.fail(sequence, grammar.failure)
        return self.scheduler.complete(sequence)

    def generate(self, requests: Iterable[EngineRequest]) -> dict[str, list[TokenEvent]]:
        """Answers all requests, batched together, and returns the events of each by its id.

        For tests and benchmarks; the worker calls `submit` and `step` itself.
        """
        events: dict[str, list[TokenEvent]] = {}
        for request in requests:
            self.submit(request)
            events[request.request_id] = []
        while not self.idle:
            for event in self.step():
                events[event.request_id].append(event)
        return events

    def _blend_bytes(self) -> int:
        """Returns the bytes of the blend cache, counted again only after a build."""
        cache = self._groups.cache
        if self._counted_builds != cache.builds:
            self._counted_builds, self._counted_bytes = cache.builds, cache.nbytes
        return self._counted_bytes

    def stats(self) -> EngineStats:
        """Returns the gauges and counters of this moment."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._compiling),
            used_blocks=blocks.referenced,
            total_blocks=blocks.num_blocks,
            running_lambdas=scheduler.running.lambdas,
            waiting_lambdas=scheduler.waiting.lambdas,
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            endpoint_executions=self._groups.executions[Way.ENDPOINT],
            blended_executions=self._groups.executions[Way.BLENDED],
            pair_executions=self._groups.executions[Way.PAIR],
            blend_hits=self._groups.cache.hits,
            blend_builds=self._groups.cache.builds,
            blend_evictions=self._groups.cache.evictions,
            blend_bytes=self._blend_bytes(),
            forced_closes=scheduler.forced_closes,
        )
