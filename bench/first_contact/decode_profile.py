"""The profiling step of first contact: measures the kernels of a decode step.

    python -m bench.first_contact.decode_profile [--smoke]

A random pair of Qwen3-4B's shapes decodes 32 sequences of 1,024 tokens, first with all λ different,
then with all at an endpoint. torch's profiler counts what runs on the device in a few steps. If
`ncu` is installed, `ncu_counters.py` then reads a few counters of the pair kernel. Only rows are
kept, no trace.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from bench.first_contact.ncu_counters import counters
from bench.first_contact.row_printer import RowPrinter
from bench.gpu.cases import Run, off
from bench.measuring.device import synchronize
from bench.models.random_pair import Place, random_pair
from bench.models.shapes import SHAPES, TINY
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams

STEPS: Final = 4  # steps that are profiled together
MOST_KERNELS: Final = 30  # kernels of a step that get rows
CASES: Final = {"different λ": lambda index, rows: (index + 0.5) / rows, "λ = 0": lambda *_: 0.0}
Facts = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    chosen = parser.parse_args(arguments)
    if not chosen.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke runs tiny shapes on a CPU")
    rows = RowPrinter("profile")
    rows.attempt("decoding", lambda: profiled(chosen.smoke, rows))
    gc.collect()
    torch.cuda.empty_cache()
    rows.attempt("ncu of the pair product", lambda: counters(chosen.smoke))
    return int(rows.failed)


def profiled(smoke: bool, rows: RowPrinter) -> Facts:
    """Prints a row for each case, and returns the facts of the engine."""
    decoding = Decoding(smoke)
    for case in CASES:
        rows.attempt(case, partial(decoding.profiled, case, rows))
    engine = asdict(decoding.engine.info)
    return {"engine": engine, **off(engine, Run("4b", smoke), decoding.device.type)}


class Decoding:
    """An engine whose sequences decode for as long as a case is measured."""

    def __init__(self, smoke: bool) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._rows, self._tokens = (4, 24) if smoke else (32, 1024)
        place = Place(device, dtype, positions=2 * self._tokens)
        model = random_pair((TINY if smoke else SHAPES)["4b"], place, "pair")
        blocks = self._rows * (self._tokens // 16 + 4)
        self.engine = Engine(
            EngineConfig(
                instruct="",
                thinking="",
                num_blocks=blocks,
                max_num_seqs=self._rows,
                max_model_len=2 * self._tokens,
                blend_cache_bytes=1 << 20,  # too few for blended weights, which no case uses
                torch_compile=False,
            ),
            model,
        )
        self.device = device

    def profiled(self, case: str, rows: RowPrinter) -> Facts:
        """Returns the time and kernels of one step, and prints a row for each of the slowest."""
        self._begin(case)
        started = time.perf_counter()
        for _ in range(STEPS):
            self._step()
        alone = (time.perf_counter() - started) / STEPS
        with profile(activities=list(self._activities())) as profiler:
            for _ in range(STEPS):
                self._step()
        self._end()
        kernels = sorted(self._kernels(profiler), key=lambda kernel: -kernel["microseconds"])
        for kernel in kernels[:MOST_KERNELS]:
            rows.row("kernel", case=case, **kernel)
        launches = sum(kernel["count"] for kernel in kernels)
        busy = sum(kernel["microseconds"] for kernel in kernels) / 1e3
        figure = f"{case}: {alone * 1e3:.2f} ms a step, {launches:.0f} kernels, {busy:.2f} ms"
        return {"figure": figure, "seconds": alone, "kernels": launches, "busy_ms": busy}

    def _begin(self, case: str) -> None:
        sampling = SamplingParams(temperature=0.0)
        waiting = set()
        for index in range(self._rows):
            prompt = tuple(16 + (index * 7919 + at * 31) % 200 for at in range(self._tokens))
            dial = Dial(round(CASES[case](index, self._rows), 4))
            request = EngineRequest(f"{case} {index}", prompt, dial, sampling)
            self.engine.submit(request)
            waiting.add(request.request_id)
        while waiting:
            waiting -= {event.request_id for event in self._step()}
        for _ in range(STEPS):
            self._step()

    def _step(self) -> list[Any]:
        events = self.engine.step()
        synchronize(self.device)
        return events

    def _end(self) -> None:
        for sequence in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.abort(sequence.request_id)
        while not self.engine.idle:
            self.engine.step()

    def _activities(self) -> Iterator[ProfilerActivity]:
        yield ProfilerActivity.CPU
        if self.device.type == "cuda":
            yield ProfilerActivity.CUDA

    def _kernels(self, profiler: Any) -> Iterator[Facts]:
        """Yields the launches and the microseconds of each kernel in one step."""
        on_device = self.device.type == "cuda"
        for event in profiler.key_averages():
            if (event.device_type.name == "CUDA") != on_device:
                continue
            total = event.self_device_time_total if on_device else event.self_cpu_time_total
            yield {
                "name": event.key[:160],
                "count": event.count / STEPS,
                "microseconds": round(total / STEPS, 2),
            }


if __name__ == "__main__":
    sys.exit(main())
