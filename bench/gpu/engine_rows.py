"""Measures one engine for the GPU bench: decode, prefill, first tokens, and complete answers.

The contexts of decode rows are not computed. The KV is filled with random numbers once, and the
blocks of a prompt are put into the prefix cache under their keys, as if a request had left them
there. So the engine finds all of the prompt but its last token, and decodes from the first step on.
Every sequence has a salt, so no two share blocks. What attention reads is as large and as scattered
as it would be, without a prefill of a million tokens.

The engine chooses how to compute each group as a server's does (`blend_policy` auto), and each row
names the ways. Steps are timed on the wall clock, from one return of `Engine.step` to a later one.
With asynchronous scheduling a step returns when the step before it is computed, so between two
returns there are complete steps of the device, with the host's work at the same time, as in a
server. A row is the median of its rounds, without the warm-up.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch

from bench.engine import HOT, first_token_seconds, speed
from bench.gpu.bounds import Way, Work, answer_work, decode_work, prefill_work, way_of
from bench.gpu.cases import Case, Lambdas, Scale, Skipped, What
from bench.gpu.memory_room import BLOCK, HOT_STEPS, PLACES, Room, room_for, tokens_of
from bench.measuring.device import synchronize
from bench.models.random_pair import Place, random_endpoint, random_pair
from bench.models.shapes import Shape, Store
from bench.models.static_engine import static_model
from bench.models.workloads import Pair
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.sequence import Sequence

VALUES: Final[dict[Lambdas, float]] = {"one": HOT, "instruct": 0.0, "thinking": 1.0}
MEMORY_OF_CPU: Final = 1e12  # bytes; more than any row needs


@dataclass(frozen=True, slots=True)
class Measured:
    """The seconds of each round, and the tokens and the work of one."""

    seconds: tuple[float, ...]
    tokens: float
    work: Work
    facts: dict[str, Any] = field(default_factory=dict)


class EngineRows:
    """Measures the rows of one engine."""

    def __init__(
        self, shape: Shape, store: Store, place: Place, scale: Scale, compiled: bool = False
    ) -> None:
        """Raises Skipped if the device has no room, and whatever pairing and starting raise."""
        started = time.perf_counter()
        self._shape, self._store, self._scale, self._device = shape, store, scale, place.device
        room = room_for(shape, store, scale, _free(place.device), place.dtype.itemsize)
        self._model = _model(shape, store, place)
        loaded = time.perf_counter()
        config = _config(store, scale, room, place.positions, compiled)
        self.engine = Engine(config, self._model)
        synchronize(self._device)
        self._start = (loaded - started, time.perf_counter() - loaded)
        _fill_with_random_numbers(self.engine)
        self._unseen = (round(0.1 + 1e-4 * index, 4) for index in range(3900))  # below HOT
        self._seeds = itertools.count()

    def facts(self) -> dict[str, Any]:
        """Returns facts of the engine; memory is in bytes."""
        blocks = self.engine.info.num_blocks * self.engine.info.block_size
        on_gpu = self._device.type == "cuda"
        return {
            "pair_seconds": self._start[0],
            "start_seconds": self._start[1],
            "kv_bytes": blocks * self._shape.kv_bytes,
            "blend_places": self._places,
            "memory_free": torch.cuda.mem_get_info(self._device)[0] if on_gpu else None,
            **asdict(self.engine.info),
        }

    def measure(self, case: Case) -> Measured:
        """Measures a case. Raises Skipped, and whatever the engine raises."""
        measures: dict[What, Callable[[Case], Measured]] = {
            "decode": self._decode,
            "prefill": self._prefill,
            "answers": self._answers,
            "first token": self._first_token,
        }
        self._check_places(case)
        before = self._ways()
        try:
            measured = measures[case.what](case)
        finally:
            self._drain()
        measured.facts.setdefault("ways", self._ways_since(before))
        return measured

    # --- Kinds of rows --------------------------------------------------------------------------

    def _decode(self, case: Case) -> Measured:
        self._check_room(tokens_of(case.sequences, case.tokens, self._scale))
        with self._running(case) as requests:
            self._until_each_has_a_token(requests)
            self._until_hot(case)
            step = min(self._seconds_a_step(1) for _ in range(self._scale.warm))
            rounds = self._scale.rounds
            steps = max(2, min(self._scale.steps, int(self._scale.seconds / rounds / step)))
            before = self._ways()
            seconds = tuple(self._seconds_a_step(steps) for _ in range(rounds))
            middle = sum(map(len, self._sequences(requests))) / case.sequences - rounds * steps / 2
        work = decode_work(self._shape, self._way(case), case.sequences, middle)
        facts = {"steps_a_round": steps, "ways": self._ways_since(before)}
        return Measured(seconds, case.sequences, work, facts)

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
        """Measures prompts with their answers, which other servers can be measured by too."""
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
        """Measures the first token at a λ never used before, in turn with that at a hot λ."""
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
        """Submits the sequences of the case, whose contexts the prefix cache has."""
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
        if case.lambdas != "one" or self._store == "static":
            return
        before = self._ways()
        for _ in range(HOT_STEPS):
            self.engine.step()
            if "blended" in self._ways_since(before):
                return
        raise RuntimeError(f"λ = {HOT} has no blended weights after {HOT_STEPS} steps alone")

    def _seconds_a_step(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            for event in self.engine.step():
                assert event.finish_reason is None, event
        return (time.perf_counter() - started) / steps

    def _drain(self) -> None:
        """Ends what is running. A step may stay in flight; the next step drops its results."""
        for sequence in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.abort(sequence.request_id)

    # --- Facts ----------------------------------------------------------------------------------

    def _sequences(self, requests: list[EngineRequest]) -> list[Sequence]:
        running = self.engine.scheduler.running
        found = [one for one in (running.get(each.request_id) for each in requests) if one]
        assert len(found) == len(requests), "a sequence was preempted"
        return found

    def _values(self, case: Case) -> list[float]:
        if case.lambdas == "different":
            return [(index + 0.5) / case.sequences for index in range(case.sequences)]
        return [VALUES[case.lambdas]] * case.sequences

    def _way(self, case: Case) -> Way:
        return way_of(self._store, one_lambda=case.lambdas in VALUES)

    def _ways(self) -> dict[str, int]:
        stats = self.engine.stats()
        return {
            "endpoint": stats.endpoint_executions,
            "blended": stats.blended_executions,
            "pair": stats.pair_executions,
        }

    def _ways_since(self, before: dict[str, int]) -> dict[str, int]:
        """Returns how many groups were computed in each way since then, without zeros."""
        ways = {way: count - before[way] for way, count in self._ways().items()}
        return {way: count for way, count in ways.items() if count}

    @property
    def _places(self) -> int:
        return self._model.groups.cache.places

    def _check_places(self, case: Case) -> None:
        """Raises Skipped if the blend cache has too few places for the case."""
        needed = {"one": 1, "never seen": PLACES}.get(case.lambdas, 0)
        if self._store != "static" and self._places < needed:
            raise Skipped(f"blended weights of {needed} λ do not fit, only of {self._places}")

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
    for cache in engine._runner.attention.caches:
        cache.normal_()


def _model(shape: Shape, store: Store, place: Place) -> BlendedModel:
    if store == "static":
        return static_model(random_endpoint(shape, place))
    return random_pair(shape, place, store)


def _free(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else MEMORY_OF_CPU


def _config(store: Store, scale: Scale, room: Room, positions: int, compiled: bool) -> EngineConfig:
    """Returns a server's default configuration, but only with the memory that the rows need."""
    settings: dict[str, Any] = {
        "block_size": BLOCK,
        "num_blocks": room.tokens // BLOCK,
        "blend_cache_bytes": room.blend_bytes,
        "max_model_len": positions,
        "max_num_seqs": max(scale.batch, scale.answers[0]),
        "cuda_graph_sizes": tuple(sorted({sequences for sequences, _ in scale.decodes})),
        "torch_compile": compiled,
    }
    if store == "static":
        settings["blend_policy"] = "pair"  # there is nothing to choose
    if store in ("int8", "int4"):
        settings["delta_dtype"] = store
    return EngineConfig("", "", **settings)


def workload(prompt: int, answer: int) -> Pair:
    return Pair("random", "", "", "bfloat16", prompt, answer)
