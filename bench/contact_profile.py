"""First contact by profile: the kernels of one decode step, and what the pair kernel is bound by.

    python -m bench.contact_profile [--smoke]

A random pair of Qwen3-4B's shapes decodes 32 sequences of 1,024 tokens, all λ different and then
all at an endpoint; torch's profiler counts what runs on the device in a few steps. Where `ncu` is
there, it then reads a few counters of the pair product of gate and up, in a process of its own and
with the clocks left alone. No trace is kept: rows are.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contact_rows import Skipped, Told
from bench.gpu_bounds import SHAPES, TINY
from bench.gpu_card import synchronize
from bench.gpu_cases import Run
from bench.gpu_pairs import Place, random_pair
from bench.gpu_subjects import what_is_off
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams

STEPS: Final = 4  # that are profiled together
MOST_KERNELS: Final = 30  # of a step, in rows
COUNTERS: Final = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
)
LAUNCHES: Final = 3  # of the pair product; the last one is read
NCU_SECONDS: Final = 45
Facts = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # under ncu
    chosen = parser.parse_args(arguments)
    if chosen.launch:
        launch_pair_product(chosen.smoke)
        return 0
    told = Told("profile")
    made: list[Decoding] = []
    told.attempt("start", lambda: start(chosen.smoke, made))
    for case in CASES if made else ():
        told.attempt(case, lambda: made[0].profiled(case, told))  # noqa: B023
    made.clear()
    torch.cuda.empty_cache()
    told.attempt("ncu of the pair product", lambda: counters(chosen.smoke))
    return int(told.failed)


CASES: Final = {"different λ": lambda index, rows: (index + 0.5) / rows, "λ = 0": lambda *_: 0.0}


def start(smoke: bool, made: "list[Decoding]") -> Facts:
    made.append(Decoding(smoke))
    engine = asdict(made[0].engine.info)
    off = what_is_off(engine, Run("4b", smoke)) if torch.cuda.is_available() else []
    return {"engine": engine, **({"error": "; ".join(off)} if off else {})}


class Decoding:
    """An engine, and sequences that decode for as long as they are wanted."""

    def __init__(self, smoke: bool) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._rows, self._tokens = (4, 24) if smoke else (32, 1024)
        place = Place(device, dtype, positions=2 * self._tokens)
        model = random_pair((TINY if smoke else SHAPES)["4b"], place, "pair")
        blocks = self._rows * (self._tokens // 16 + 4)
        self.engine = Engine(
            EngineConfig(
                *("", ""),
                num_blocks=blocks,
                max_num_seqs=self._rows,
                max_model_len=2 * self._tokens,
                blend_cache_bytes=1 << 20,  # no hot λ: its weights are read like an endpoint's
                torch_compile=False,
            ),
            model,
        )
        self._device = device

    def profiled(self, case: str, told: Told) -> Facts:
        """Of one step; rows of its kernels are told as they are found."""
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
            told.row("kernel", case=case, **kernel)
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
        synchronize(self._device)
        return events

    def _end(self) -> None:
        for sequence in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.abort(sequence.request_id)
        while not self.engine.idle:
            self.engine.step()

    def _activities(self) -> Iterator[ProfilerActivity]:
        yield ProfilerActivity.CPU
        if self._device.type == "cuda":
            yield ProfilerActivity.CUDA

    def _kernels(self, profiler: Any) -> Iterator[Facts]:
        """By name: how often a step has it, and its microseconds of a step."""
        on_device = self._device.type == "cuda"
        for event in profiler.key_averages():
            if (event.device_type.name == "CUDA") != on_device:
                continue
            total = event.self_device_time_total if on_device else event.self_cpu_time_total
            yield {
                "name": event.key[:160],
                "count": event.count / STEPS,
                "microseconds": round(total / STEPS, 2),
            }


# --- Counters ------------------------------------------------------------------------------------


def launch_pair_product(smoke: bool) -> None:
    """Gate and up of Qwen3-4B, 32 rows, each of another λ."""
    from mi_runtime.kernels.pair_linear import pair_linear

    device = "cpu" if smoke else "cuda"
    dtype = torch.float32 if smoke else torch.bfloat16
    rows, columns, depth = (4, 40, 256) if smoke else (32, 19456, 2560)
    both = torch.randn(columns, 2, depth, device=device).to(dtype)
    x = torch.randn(rows, depth, device=device).to(dtype)
    weights = torch.rand(rows, device=device)
    for _ in range(LAUNCHES):
        pair_linear(x, both[:, 0], both[:, 1], weights)
    synchronize(x.device)


def counters(smoke: bool) -> Facts:
    if smoke:
        launch_pair_product(smoke)
        raise Skipped("rehearsed without a GPU")
    if shutil.which("ncu") is None:
        raise Skipped("there is no ncu")
    command = [
        *("ncu", "--clock-control", "none", "--kernel-name", "regex:_product", "--csv"),
        *("--launch-skip", str(LAUNCHES - 1), "--launch-count", "1", "--page", "raw"),
        *("--metrics", ",".join(COUNTERS)),
        *(sys.executable, "-m", "bench.contact_profile", "--launch"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS, check=False)
    found = counted(done.stdout)
    if not found:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    share = found.get("dram__throughput.avg.pct_of_peak_sustained_elapsed", "?")
    return {"figure": f"pair kernel {share} % of the memory's peak", "counters": found}


def counted(output: str) -> Facts:
    """What ncu printed as CSV: a line of names, one of units, and one a launch."""
    lines = output.splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return {}
    names, units, *launches = csv.reader(lines[begin:])
    return (
        {
            f"{name} [{unit}]" if unit not in ("", "%") else name: value
            for name, unit, value in zip(names, units, launches[-1], strict=True)
            if name in COUNTERS
        }
        if launches
        else {}
    )


if __name__ == "__main__":
    sys.exit(main())
