"""Measures the host's work in a decode step, and how much of it the device's own work hides.

    python -m bench.host [--rows 1,32,256] [--device-ms 5] [--context 1024] [--steps 100]

The engine is the real one with asynchronous scheduling, on a model of 36 layers that computes
nothing. A fake device has a queue of work: a forward begins when everything before it is done, and
takes its milliseconds. Until the device's clock reaches the end of the work that it waits for, the
thread spins, as it does on CUDA's events. Decode steps are replayed, as on a GPU. The
vocabulary is tiny, so that the tensor work of a draw, which a GPU would do, is small compared with
the host's work of launching it. All times are CPU time of the engine's thread, so that other work
on the machine is not counted, though it slows cores and caches.

Rows are milliseconds, medians over the steps of a run:

    not hidden      the length of a step minus the device's own time
    device idle     the time between the end of what was queued and the next launch (mean)
    host            the work of the engine's thread in a step, without waiting, and its parts

Each is measured for greedy and sampled answers, at one hot λ and at a different λ for every row,
and with one answer ending in each step. `dispatches` counts what a step launches outside the
forward, on a device whose tensors have no values.
"""

import argparse
import gc
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn

import mi_runtime.execution.in_flight_step
import mi_runtime.execution.runner
from bench.measuring.arguments import at_least, numbers
from bench.measuring.dispatches import EachDispatch
from bench.measuring.publishing import publish
from mi_runtime.attention.plan import LayerShape
from mi_runtime.config import EngineConfig
from mi_runtime.device.transfer import Readback
from mi_runtime.engine import Engine
from mi_runtime.execution.decode_graphs import Capture, DecodeGraphs, sizes_for
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import BlendGroups
from mi_runtime.request import Dial, EngineRequest, SamplingParams, StepReport
from mi_runtime.scheduling.planner import CostCurve, CostModel, Planner
from mi_runtime.worker import receive

LAYERS: Final = 36  # layers of a 4B model
VOCABULARY: Final = 8
WARM_UP: Final = 20  # steps
LAST: Final = 5  # steps at the end, in which rows end; they are not counted
FLAT = (1, 256)  # rows between which decoding costs what reading the weights does
COSTS = CostModel(
    0.03, 0.0, CostCurve(FLAT, (0.0043, 0.0043)), CostCurve(FLAT, (0.007, 0.007)), build=0.01
)
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.95, top_k=20, seed=1)
READER = "from multiprocessing.connection import Connection as C\nc = C({fd})\nwhile 1: c.recv()"


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    sampling: SamplingParams
    lambdas: int  # how many; if 1, its blended weights are in the cache
    ending: bool = False  # one row ends in every step

    @property
    def name(self) -> str:
        drawn = "sampled" if self.sampling.temperature else "greedy"
        dials = "one λ" if self.lambdas == 1 else f"{self.lambdas} λ"
        return f"{self.rows} rows, {drawn}, {dials}{', one ends a step' * self.ending}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=numbers, default=[1, 32, 256], metavar="ROWS",
                        help="numbers of sequences, separated by commas (1,32,256)")  # fmt: skip
    parser.add_argument("--device-ms", type=float, default=5.0, help="length of a forward (5)")
    parser.add_argument(
        "--context", type=at_least(1), default=1024, help="tokens of a prompt (1024)"
    )
    parser.add_argument(
        "--steps", type=at_least(LAST + 1), default=100, help="steps of a run (100)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values: dict[str, list[float]] = {}
    for case in cases(arguments.rows):
        found = run(case, arguments.device_ms / 1e3, arguments.context, arguments.steps)
        parts = ", ".join(f"{part} {median(ms):.3f}" for part, ms in found.items())
        print(f"{case.name}: {parts}", flush=True)
        values |= {f"{case.name}: {part}": ms for part, ms in found.items()}
    ends = ("not hidden", "host")
    publish(
        "host",
        "ms a step",
        values,
        {f"{name}, ms": median(one) for name, one in values.items() if name.endswith(ends)},
    )


def cases(rows: Sequence[int]) -> Iterator[Case]:
    for count in rows:
        for sampling in (GREEDY, SAMPLED):
            yield Case(count, sampling, 1)
            if count > 1:
                yield Case(count, sampling, count)
        if count > 1:
            yield Case(count, SAMPLED, count, ending=True)


# --- The fake device ---------------------------------------------------------------------------


class FakeDevice:
    """A device with a queue of work: each piece begins when everything before it is done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds  # length of a forward
        self._free_at = 0.0
        self.idle = 0.0  # seconds since start
        self.waited = 0.0

    def launch(self, seconds: float) -> float:
        """Returns the time at which the launched work will be done."""
        now = time.thread_time()
        self.idle += max(0.0, now - self._free_at)
        self._free_at = max(now, self._free_at) + seconds
        return self._free_at

    def forward(self) -> None:
        self.launch(self._seconds)

    def wait_until(self, moment: float) -> None:
        started = time.thread_time()
        while time.thread_time() < moment:
            pass
        self.waited += time.thread_time() - started

    def readback(self) -> type[Readback]:
        """Replaces the readback of results, so that it waits for the fake device."""
        fake = self

        class Queued(Readback):
            def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
                super().__init__(tensors, device)
                self._there = fake.launch(0.0)

            def wait(self) -> Iterator[Tensor]:
                fake.wait_until(self._there)
                return super().wait()

        return Queued


@dataclass(frozen=True, slots=True)
class InstantModel(BlendedModel):
    """A model whose forward only occupies the fake device, and whose logits are always the same."""

    forward: Callable[[], None] = lambda: None

    def logits(self, ids: Tensor, positions: Tensor, kept: Tensor, attention: Any) -> Tensor:
        self.forward()
        return torch.empty(len(kept), VOCABULARY, dtype=self.dtype, device=self.device).zero_()


def instant_model(forward: Callable[[], None], device: torch.device) -> InstantModel:
    nothing = nn.Module()
    nothing.config = argparse.Namespace(model_type="instant")  # type: ignore[assignment]
    return InstantModel(
        model=nothing,
        groups=BlendGroups(LAYERS, device, BlendCache(2)),
        layers=(LayerShape(1, 1, 1, 1),) * 2,
        device=device,
        dtype=torch.bfloat16,
        vocab_size=VOCABULARY,
        weight_bytes=0,
        peak_bytes=0,
        load_seconds=0.0,
        identity="instant",
        max_positions=2**17,
        forward=forward,
    )


def engine_of(
    case: Case, context: int, forward: Callable[[], None], device: torch.device
) -> Engine:
    """Makes an engine with captured decode steps, whose planner assumes a GPU's costs."""
    blocks = (context + 1024) // 16
    config = EngineConfig(
        "",
        "",
        num_blocks=case.rows * blocks,
        max_num_seqs=case.rows,
        max_batched_tokens=2**20,
        async_scheduling=True,
        blend_policy="pair",
        attention_backend="reference",
        prefix_caching=True,
    )
    model = instant_model(forward, device)
    engine = Engine(config, model)
    runner, cache = engine._runner, model.groups.cache
    cache.places = 2
    runner.planner = Planner("auto", COSTS, lambda dial: 0.0, cache.places)
    runner.graphs = DecodeGraphs(
        model,
        runner.attention,
        fake_capture(forward),
        sizes=sizes_for(case.rows),
        max_blocks=blocks,
    )
    runner.graphs.capture()
    return engine


def fake_capture(forward: Callable[[], None]) -> Capture:
    """Returns a capture whose replay returns the logits of the captured run."""

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        logits = run()

        def replay() -> Tensor:
            forward()
            return logits

        return replay

    return capture


def submit(engine: Engine, case: Case, context: int, steps: int) -> None:
    for row in range(case.rows):
        tokens = max(2, WARM_UP + steps - row) if case.ending else WARM_UP + steps
        dial = Dial.on_grid((row % case.lambdas + 1) / (case.lambdas + 1), 0.001)
        prompt = tuple((row + place) % VOCABULARY for place in range(context))
        sampling = replace(case.sampling, max_tokens=tokens)
        engine.submit(EngineRequest(f"chatcmpl-{row:032x}", prompt, dial, sampling))


# --- Seconds -----------------------------------------------------------------------------------


def run(case: Case, seconds: float, context: int, steps: int) -> dict[str, list[float]]:
    """Returns the milliseconds of every step, for each part of it."""
    device = FakeDevice(seconds)
    engine = engine_of(case, context, device.forward, torch.device("cpu"))
    submit(engine, case, context, steps)
    clock = Clock()
    gc.collect()
    gc.freeze()  # as the worker does
    with reader() as pipe, watched(engine, clock, device):
        for _ in range(WARM_UP):
            _step(engine, pipe, clock)
        clock.steps.clear()
        idle, period = device.idle, []
        started = time.thread_time()
        for _ in range(steps - LAST):
            waited = device.waited
            _step(engine, pipe, clock)
            now = time.thread_time()
            period.append(now - started)
            clock.steps[-1]["host"] = now - started - (device.waited - waited)
            started = now
        idle = device.idle - idle
    return {
        "not hidden": [1e3 * (one - seconds) for one in period],
        "device idle": [1e3 * idle / len(period)],
        **clock.table(),
    }


def _step(engine: Engine, pipe: "Connection[object, object]", clock: "Clock") -> None:
    """Runs one step as the worker does."""
    clock.begin()
    events = clock.timed("receive", receive)(pipe, engine)
    events += engine.step()
    report = clock.timed("stats", engine.stats)()
    clock.timed("report", pipe.send)(StepReport(tuple(events), report))


@contextmanager
def reader() -> Iterator["Connection[object, object]"]:
    """Opens a pipe to a process that reads everything it gets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        process = subprocess.Popen([sys.executable, "-c", READER.format(fd=fd)], pass_fds=[fd])
        theirs.close()
        yield Connection(ours.detach())
        process.kill()
        process.wait()


@contextmanager
def watched(engine: Engine, clock: "Clock", device: FakeDevice) -> Iterator[None]:
    """Times the parts of every step, and lets results wait for the fake device."""
    runner = engine._runner
    module, graphs = mi_runtime.execution.runner, runner.graphs
    parts: list[tuple[object, str, str]] = [
        (engine.scheduler, "schedule", "schedule"),
        (runner.planner, "plan", "plan"),
        (module, "build_batch", "build batch"),
        (graphs, "key_for", "form"),
        (graphs, "_write", "write buffers"),
        (graphs, "_write_lambdas", "write λ"),
        (engine.scheduler, "update", "update"),
        (runner, "sample", "sample"),
    ]
    patches = [
        patch.object(owner, name, clock.timed(part, getattr(owner, name)))
        for owner, name, part in parts
    ]
    patches.append(patch.object(mi_runtime.execution.in_flight_step, "Readback", device.readback()))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


class Clock:
    """Measures the seconds of the parts of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self.steps.append({"host": 0.0})

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                now = self.steps[-1]
                now[part] = now.get(part, 0.0) + time.thread_time() - started

        return timed_call

    def table(self) -> dict[str, list[float]]:
        names = dict.fromkeys(name for step in self.steps for name in step)
        return {part: [1e3 * one.get(part, 0.0) for one in self.steps] for part in names}


# --- Counts ------------------------------------------------------------------------------------


class Dispatches(EachDispatch):  # type: ignore[no-untyped-call]
    """Counts dispatches for a device whose tensors have no values. Results are zeros."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            fetched = kwargs["device"].type == "cpu"
            self.counts["fetched" if fetched else "sent"] += 1
            if fetched:
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor | tuple | list):
            on_device = any(
                isinstance(one, Tensor) and one.is_meta
                for one in (result if isinstance(result, tuple | list) else (result,))
            )
            if on_device:
                self.counts["views" if func.is_view else "launched"] += 1
        return result


def dispatches(case: Case, context: int = 64, steps: int = 10) -> dict[str, float]:
    """Returns how many operators a step dispatches outside the forward, by kind."""
    device = torch.device("meta")
    counting = Dispatches()
    with patch.object(Tensor, "pin_memory", lambda tensor: tensor), counting:
        engine = engine_of(case, context, lambda: None, device)
        submit(engine, replace(case, ending=False), context, steps)
        for _ in range(WARM_UP):
            engine.step()
        counting.counts.clear()
        for _ in range(steps - LAST):
            engine.step()
    return {name: count / (steps - LAST) for name, count in counting.counts.items()}


if __name__ == "__main__":
    main()
