"""Rows of the GPU bench on one engine: decode, prefill, first tokens, and whole answers.

A decode row's contexts are not computed. The KV is filled with random numbers once, and the blocks
of a prompt are put into the prefix cache under their keys, as if a request had left them there: the
engine then finds all of the prompt but its last token, and decodes from the first step on. Every
sequence has a salt, so that none shares its blocks. What attention reads is as large and as
scattered as it would be, and prefilling two million tokens is left out.

The engine chooses its ways as a server's does (`blend_policy` auto); each row tells which it took.
Timed is `Engine.step`, in rounds of many steps between two synchronizations, on the wall clock; a
row is the median of its rounds, and warm-up is outside.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from bench.engine import HOT, first_token_seconds, speed
from bench.gpu_bounds import (
    Shape,
    Store,
    Way,
    Work,
    answer_work,
    decode_work,
    prefill_work,
    way_of,
)
from bench.gpu_card import synchronize
from bench.gpu_pairs import Place, random_endpoint, random_pair
from bench.static import static_model
from bench.workload import Pair
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams

What = Literal["start", "decode", "prefill", "first token", "answers"]
Lambdas = Literal["one", "different", "never seen"]
WARM_STEPS = 6
HOT_STEPS = 200  # in which a λ that stays alone must have got its blended weights
MOST_STEPS = 32  # of a round
SPARE = 1024  # tokens that a context may grow by while it is measured


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the rows are; the first of each are the most important."""

    batches: tuple[int, ...] = (32, 1, 8, 128, 256)
    contexts: tuple[int, ...] = (1024, 8192)
    prefill: tuple[int, int] = (8, 2048)  # sequences, tokens each
    prompts: tuple[int, ...] = (1024, 64)  # whose first token is waited for
    answers: tuple[int, int, int] = (32, 1024, 128)  # sequences, tokens of prompt and of answer
    rounds: int = 5
    seconds: float = 1.0  # that the rounds of a decode row may take together
    blocks: int | None = None  # of KV; None: what the memory holds
    blend_bytes: int | None = None  # of blended weights, likewise
    compiled: bool = False  # what is recorded


SMALL = Scale(
    *((2, 1), (16, 48), (2, 24), (8,), (32, 8, 4)),
    rounds=2,
    seconds=0.01,
    blocks=96,
    blend_bytes=1 << 21,
)


@dataclass(frozen=True, slots=True)
class Case:
    """What one row measures; `tokens` of context or prompt, each sequence."""

    what: What
    lambdas: Lambdas = "one"
    sequences: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """`tokens` computed in each of `seconds`, one a round, for `work`."""

    seconds: tuple[float, ...]
    tokens: float
    work: Work
    facts: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """A row that this engine or this memory cannot have; the message says why."""


def cases_of(store: Store, scale: Scale) -> list[Case]:
    """In order of importance; a hot λ of compact deltas has one row, its weights are a pair's."""
    kinds: list[Lambdas] = ["one"] if store == "static" else ["different", "one"]
    mostly = kinds[:1] if store in ("int8", "int4") else kinds
    first, *others = [
        Case("decode", "one", batch, context)
        for context in scale.contexts
        for batch in scale.batches
    ]
    sequences, prompt, _ = scale.answers
    cases = _each(first, kinds) + _each(Case("prefill", "one", *scale.prefill), mostly)
    cases += _each(Case("answers", "one", sequences, prompt), mostly)
    if store == "pair":
        cases += [Case("first token", "never seen", 1, length) for length in scale.prompts]
    return cases + [case for other in others for case in _each(other, mostly)]


def _each(case: Case, kinds: list[Lambdas]) -> list[Case]:
    return [Case(case.what, kind, case.sequences, case.tokens) for kind in kinds]


class Rows:
    """One engine's rows."""

    def __init__(self, shape: Shape, store: Store, place: Place, scale: Scale) -> None:
        started = time.perf_counter()
        self._shape, self._store, self._scale, self._device = shape, store, scale, place.device
        self.cases = cases_of(store, scale)
        config = _config(store, scale)
        if store == "static":
            model = static_model(random_endpoint(shape, place))
        else:
            model = random_pair(shape, place, store)
        loaded = time.perf_counter()
        self.engine = Engine(config, model)
        synchronize(self._device)
        self.start = (loaded - started, time.perf_counter() - loaded)
        _fill_with_random_numbers(self.engine)
        self._unseen = (round(0.1 + 1e-4 * index, 4) for index in range(3900))  # below HOT
        self._seeds = itertools.count()

    def facts(self) -> dict[str, Any]:
        """Of the engine; memory in bytes."""
        blocks = self.engine.info.num_blocks * self.engine.info.block_size
        return {
            "pair_seconds": self.start[0],
            "start_seconds": self.start[1],
            "kv_bytes": blocks * self._shape.kv_bytes,
            "memory_free": torch.cuda.mem_get_info()[0] if self._device.type == "cuda" else None,
            **asdict(self.engine.info),
        }

    def measure(self, case: Case) -> Measured:
        """Raises Skipped, and whatever the engine raises."""
        measures: dict[What, Callable[[Case], Measured]] = {
            "decode": self._decode,
            "prefill": self._prefill,
            "answers": self._answers,
            "first token": self._first_token,
        }
        before = self._ways()
        try:
            measured = measures[case.what](case)
        finally:
            self._drain()
        ways = {way: count - before[way] for way, count in self._ways().items()}
        measured.facts["ways"] = {way: count for way, count in ways.items() if count}
        return measured

    # --- Kinds of rows --------------------------------------------------------------------------

    def _decode(self, case: Case) -> Measured:
        if case.lambdas == "different" and case.sequences == 1:
            raise Skipped("one sequence has one λ, which soon is hot")
        self._check_room(case.sequences * (case.tokens + SPARE // 4))
        with self._running(case) as requests:
            self._until_each_has_a_token(requests)
            self._until_hot(case)
            step = min(self._seconds_a_step(2) for _ in range(WARM_STEPS))
            rounds = self._scale.rounds
            steps = max(2, min(MOST_STEPS, int(self._scale.seconds / rounds / step)))
            seconds = tuple(self._seconds_a_step(steps) for _ in range(rounds))
            middle = sum(map(len, self._sequences(requests))) / case.sequences - rounds * steps / 2
        work = decode_work(self._shape, self._way(case), case.sequences, middle)
        return Measured(seconds, case.sequences, work, {"steps_a_round": steps})

    def _prefill(self, case: Case) -> Measured:
        self._check_room(case.sequences * case.tokens)
        pair = workload(case.tokens, 1)
        rates = [
            speed(self.engine, pair, self._values(case), next(self._seeds)).prefill
            for _ in range(self._scale.rounds)
        ]
        tokens = case.sequences * case.tokens
        seconds = tuple(tokens / rate for rate in rates[1:])  # the first is the warm-up
        work = prefill_work(self._shape, self._way(case), case.sequences, case.tokens)
        return Measured(seconds, tokens, work)

    def _answers(self, case: Case) -> Measured:
        """Prompts and answers; both the engine's rows and those of other servers have it."""
        length = self._scale.answers[2]
        self._check_room(case.sequences * (case.tokens + length))
        pair, values = workload(case.tokens, length), self._values(case)
        speeds = [speed(self.engine, pair, values, next(self._seeds)) for _ in range(3)][1:]
        tokens = case.sequences * length
        work = answer_work(self._shape, self._way(case), case.sequences, case.tokens, length)
        parts = {part: max(getattr(one, part) for one in speeds) for part in ("prefill", "decode")}
        return Measured(
            tuple(tokens / one.both for one in speeds), tokens, work, {"tokens_a_second": parts}
        )

    def _first_token(self, case: Case) -> Measured:
        """Of a λ that nobody asked for before, in turn with a hot one's."""
        pair = workload(case.tokens, 1)
        times: dict[str, list[float]] = {"never seen": [], "hot": []}
        for index in range(2 * self._scale.rounds + 1):
            for name, value in (("never seen", next(self._unseen)), ("hot", HOT)):
                seconds = first_token_seconds(self.engine, pair, value, next(self._seeds))
                self._drain()
                times[name] += [seconds] if index else []
        work = prefill_work(self._shape, self._way(case), 1, case.tokens)
        return Measured(
            tuple(times["never seen"]), case.tokens, work, {"hot_seconds": times["hot"]}
        )

    # --- Steps ----------------------------------------------------------------------------------

    @contextmanager
    def _running(self, case: Case) -> Iterator[list[EngineRequest]]:
        """Sequences of the case with their contexts, until it is left."""
        seed = next(self._seeds)
        prompt = tuple(16 + index * 7919 % 256 for index in range(case.tokens + 1))
        sampling = SamplingParams(temperature=0.0)
        requests = [
            EngineRequest(f"{seed}-{index}", prompt, Dial(value), sampling, None, f"{seed}-{index}")
            for index, value in enumerate(self._values(case))
        ]
        for request in requests:
            pretend_computed(self.engine, request)
        for request in requests:
            self.engine.submit(request)
        yield requests

    def _until_each_has_a_token(self, requests: list[EngineRequest]) -> None:
        waiting = {request.request_id for request in requests}
        while waiting:
            for event in self.engine.step():
                assert event.finish_reason is None, event
                waiting.discard(event.request_id)

    def _until_hot(self, case: Case) -> None:
        if case.lambdas == "different" or self._store == "static":
            return
        before = self.engine.stats().blended_executions
        for _ in range(HOT_STEPS):
            if self.engine.stats().blended_executions > before:
                return
            self.engine.step()

    def _seconds_a_step(self, steps: int) -> float:
        synchronize(self._device)
        started = time.perf_counter()
        for _ in range(steps):
            for event in self.engine.step():
                assert event.finish_reason is None, event
        synchronize(self._device)
        return (time.perf_counter() - started) / steps

    def _drain(self) -> None:
        for sequence in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.abort(sequence.request_id)
        while not self.engine.idle:
            self.engine.step()

    # --- Facts ----------------------------------------------------------------------------------

    def _sequences(self, requests: list[EngineRequest]) -> list[Any]:
        found = [self.engine.scheduler.running.get(request.request_id) for request in requests]
        assert all(found), "a sequence was preempted"
        return found

    def _values(self, case: Case) -> list[float]:
        if case.lambdas == "one":
            return [HOT] * case.sequences
        return [(index + 0.5) / case.sequences for index in range(case.sequences)]

    def _way(self, case: Case) -> Way:
        return way_of(self._store, one_lambda=case.lambdas == "one")

    def _ways(self) -> dict[str, int]:
        stats = self.engine.stats()
        return {
            "endpoint": stats.endpoint_executions,
            "blended": stats.blended_executions,
            "pair": stats.pair_executions,
        }

    def _check_room(self, tokens: int) -> None:
        info = self.engine.info
        room = info.num_blocks * info.block_size
        if tokens > room:
            raise Skipped(f"KV of {tokens:,} tokens does not fit: there is room for {room:,}")


def pretend_computed(engine: Engine, request: EngineRequest) -> None:
    """Leaves the blocks of the prompt's KV in the prefix cache, whatever their content."""
    pool, size = engine.scheduler.blocks, engine.info.block_size
    key, blocks = pool.root_key(request.dial, request.cache_salt), []
    for start in range(0, len(request.prompt) - size, size):
        key = pool.next_key(key, request.prompt[start : start + size])
        blocks.append(pool.allocate())
        pool.register(blocks[-1], key)
    pool.release(blocks)


@torch.inference_mode()
def _fill_with_random_numbers(engine: Engine) -> None:
    attention = engine._runner.attention
    for cache in (*attention._keys, *attention._values):
        cache.normal_()


def _config(store: Store, scale: Scale) -> EngineConfig:
    """A server's defaults, but for the room that the rows need."""
    settings: dict[str, Any] = {
        "num_blocks": scale.blocks,
        "blend_cache_bytes": scale.blend_bytes,
        "max_model_len": max(scale.contexts) + SPARE,
        "max_num_seqs": max(scale.batches),
        "torch_compile": scale.compiled,
    }
    if store == "static":
        settings["blend_policy"] = "pair"  # there is nothing to choose
    if store in ("int8", "int4"):
        settings["delta_dtype"] = store
    return EngineConfig("", "", **settings)


def workload(prompt: int, answer: int) -> Pair:
    return Pair("random", "", "", "bfloat16", prompt, answer)
