"""The engine on a GPU against the card's own limits, on random pairs of real shapes.

    python -m bench.gpu [--model 4b|30b-a3b] [--only static,pair,…] [--seconds 360] [--out DIR]
    python -m bench.gpu --compile --only card,static,pair --seconds 560     recorded steps compiled
    python -m bench.gpu --smoke       every row on tiny shapes, on whatever device there is

Rows: a decode step at 1 to 256 sequences and contexts of 1k and 8k, prefill, 32 whole answers, and
the first token of a λ never seen before. Subjects, in this order, each in a process of its own, so
that none's memory or mistake reaches the next:

    card       bandwidth and matrix rate, measured: what the others' bounds are taken from
    static     the engine on a merged model, without any pair module
    pair       both endpoints in bf16: one hot λ, and all different
    int8, int4 the difference kept small: all different
    batching   continuous batching of `transformers`, one λ
    generate   its `generate` with static cache and compilation, one λ

Compiling takes a server minutes at start, which rows would not have: so recorded steps run as they
are unless `--compile` says otherwise. `--seconds` is for all together: what a subject does not use,
the next ones have, and rows come in order of importance. The JSON is written after each row; a row
that fails says so and the next one runs; one without room or time says that it was skipped. Bounds
are told in `bench/gpu_bounds.py`, how rows are timed in `bench/gpu_rows.py`.
"""

import argparse
import gc
import importlib.metadata
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from bench.gpu_bounds import SHAPES, TINY, Shape
from bench.gpu_card import FULL, SMALL, measure_card
from bench.gpu_pairs import Place
from bench.gpu_peers import Batching, Generate
from bench.gpu_report import Record, Report, reference_of
from bench.gpu_rows import SMALL as SMALL_SCALE
from bench.gpu_rows import Case, Measured, Rows, Scale, Skipped
from bench.report import RESULTS, machine
from bench.workload import BUILD

SUBJECTS: Final = {  # and the share of the time that each is given
    "card": 1,
    "static": 3,
    "pair": 5,
    "int8": 3,
    "int4": 3,
    "batching": 3,
    "generate": 4,
}
GRACE: Final = 15  # seconds that a row which began in time may still take
LONGEST_ERROR: Final = 500  # characters
OUT_OF_TIME: Final = "out of time"


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, and how large."""

    model: str
    smoke: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        kinds = {"compiled": self.compiled, "smoke": self.smoke}
        return "-".join(["gpu", self.model, *(kind for kind, is_so in kinds.items() if is_so)])

    @property
    def shape(self) -> Shape:
        return (TINY if self.smoke else SHAPES)[self.model]

    @property
    def scale(self) -> Scale:
        return replace(SMALL_SCALE if self.smoke else Scale(), compiled=self.compiled)

    @property
    def place(self) -> Place:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return Place(device, dtype, positions=max(self.scale.contexts) + 2048)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="4b")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects")
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--compile", action="store_true", help="recorded steps compiled")
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)  # a child's
    chosen = parser.parse_args(arguments)
    run = Run(chosen.model, chosen.smoke, chosen.compile)
    subjects = chosen.only.split(",")
    if unknown := set(subjects) - SUBJECTS.keys():
        parser.error(f"--only: there are {', '.join(SUBJECTS)}, not {', '.join(sorted(unknown))}")
    if chosen.subject:
        for record in rows_of(chosen.subject, run, chosen.seconds):
            print(json.dumps(record), flush=True)
        return 0
    if not run.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke runs tiny shapes on a CPU")
    report = Report(run.name, chosen.out or (BUILD if run.smoke else RESULTS))
    started = time.monotonic()
    for record in rows_of_all(subjects, run, chosen.seconds):
        report.add(record)
    report.finish(reference_of(run.scale), time.monotonic() - started)
    return 0


def rows_of_all(subjects: list[str], run: Run, seconds: float) -> Iterator[Record]:
    """One subject after another; what one leaves of its time, the next ones share."""
    deadline = time.monotonic() + seconds
    for index, subject in enumerate(subjects):
        left = deadline - time.monotonic()
        allowed = left * SUBJECTS[subject] / sum(SUBJECTS[one] for one in subjects[index:])
        if left <= 0:
            yield record_of(subject, Case("start"), skipped=OUT_OF_TIME)
        else:
            yield from (rows_of if run.smoke else rows_of_child)(subject, run, allowed)


# --- One subject ---------------------------------------------------------------------------------


def rows_of(subject: str, run: Run, seconds: float) -> Iterator[Record]:
    """Here, in this process; what fails is a row that says so."""
    deadline = time.monotonic() + seconds
    if subject == "card":
        yield attempt(subject, Case("start"), lambda: card_facts(run))
        return
    made: list[Any] = []
    yield attempt(subject, Case("start"), lambda: start_facts(subject, run, made))
    if made:
        yield from rows_until(deadline, subject, made.pop())
    gc.collect()  # as the next subject may follow in this process


def rows_until(deadline: float, subject: str, measuring: Any) -> Iterator[Record]:
    for case in measuring.cases:
        if time.monotonic() > deadline:
            yield record_of(subject, case, skipped=OUT_OF_TIME)
        else:
            yield attempt(subject, case, lambda: values_of(measuring.measure(case)))  # noqa: B023


def attempt(subject: str, case: Case, measure: Callable[[], Record]) -> Record:
    try:
        return record_of(subject, case, **measure())
    except Skipped as reason:
        return record_of(subject, case, skipped=str(reason))
    except Exception as error:  # whatever it is, the other rows are wanted
        message = f"{type(error).__name__}: {error}"[:LONGEST_ERROR]
    gc.collect()  # the error held the frames, and they tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return record_of(subject, case, error=message)


def record_of(subject: str, case: Case, **values: Any) -> Record:
    return {"subject": subject, **asdict(case), **values}


def card_facts(run: Run) -> Record:
    return {
        "card": asdict(measure_card(run.place.device, SMALL if run.smoke else FULL)),
        "machine": {**machine(), "cuda": torch.version.cuda, "triton": version_of("triton")},
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def start_facts(subject: str, run: Run, made: list[Any]) -> Record:
    """Puts what can be measured into `made`."""
    started = time.perf_counter()
    parts = (run.shape, run.place, run.scale)
    if subject == "batching":
        made.append(Batching(*parts))
    elif subject == "generate":
        made.append(Generate(*parts))
    else:
        shape, place, scale = parts
        rows = Rows(shape, subject, place, scale)  # type: ignore[arg-type]
        made.append(rows)
        return {"engine": rows.facts()}
    return {"start_seconds": time.perf_counter() - started}


def values_of(measured: Measured) -> Record:
    middle = median(measured.seconds)
    return {
        "seconds": middle,
        "lowest": min(measured.seconds),
        "highest": max(measured.seconds),
        "rounds": len(measured.seconds),
        "tokens_a_second": measured.tokens / middle,
        "work": asdict(measured.work),
        "facts": measured.facts,
    }


def rows_of_child(subject: str, run: Run, seconds: float) -> Iterator[Record]:
    """In a process of its own, which is ended when its time has long passed."""
    command = [sys.executable, "-m", "bench.gpu", "--subject", subject, "--model", run.model]
    command += ["--seconds", str(seconds), *(["--smoke"] if run.smoke else [])]
    command += ["--compile"] if run.compiled else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        clock = threading.Timer(seconds + GRACE, child.kill)
        clock.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith('{"subject"'):
                    yield json.loads(line)
                else:
                    print(line, end="", flush=True)
            child.wait()
        finally:
            clock.cancel()
            child.kill()  # nothing, where it has ended
    if child.returncode:
        killed = child.returncode == -signal.SIGKILL
        why = OUT_OF_TIME if killed else f"exit code {child.returncode}"
        yield record_of(subject, Case("start"), error=f"the process ended early: {why}")


if __name__ == "__main__":
    sys.exit(main())
