"""Measures the engine on a GPU against the card's own limits, on random pairs of real shapes.

    python -m bench.gpu [--model NAME] [--only static,pair,…] [--seconds 360] [--out DIR]
    python -m bench.gpu --compile --only card,static,pair      recorded steps compiled
    python -m bench.gpu --smoke       every row on tiny shapes, on any device

Rows: a decode step at 1, 32 and 128 sequences and contexts of 1k and 8k, prefill, 32 complete
answers, and the first token at a λ never used before. Subjects, in this order:

    card       bandwidth and matrix rate, measured; the bounds of the other subjects are computed
               from them, or from the maker's figures if this was not measured (the rows say which)
    static     the engine on a merged model, without any pair module
    pair       both endpoints in bf16: λ all different, one hot λ, and each endpoint
    int8, int4 rounded deltas: λ all different
    batching   continuous batching of `transformers`, one λ
    generate   its `generate` with static cache and compilation, one λ

`--seconds` is one deadline for everything; subjects and starts have no limits of their own. Rows
come in order of importance (`bench/gpu_cases.py`), and the JSON is written after each. Subjects
that share a process run one after another. If the process dies, the row in progress becomes an
error and a new process runs the rest. A row that fails reports the error, and the next one runs; a
row without room or time reports that it was skipped. An engine that runs without recorded steps or
without kernels is an error, though its rows are measured. The exit code is 1 if there was any
error, or if every row was skipped.

Each row is printed as a line of JSON that begins with `{"subject"`, and as a line to read.
`bench/gpu_bounds.py` explains the bounds, `bench/gpu_rows.py` how rows are timed.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.arguments import made_folder, names
from bench.gpu_bounds import SHAPES
from bench.gpu_cases import (
    DEVICE_LOST,
    GROUPS,
    NOT_STARTED,
    OUT_OF_TIME,
    START,
    SUBJECTS,
    Job,
    Row,
    Run,
    jobs_of,
)
from bench.gpu_report import Report

BUILD, RESULTS = Path("build/bench"), Path(__file__).parent / "results"
GRACE: Final = 5  # seconds that a row in progress may still take after the deadline
PR_SET_PDEATHSIG: Final = 1  # option of Linux's prctl
COMMAND: Final = (sys.executable, "-m", "bench.gpu_subjects")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="4b", help="its shapes (4b)")
    parser.add_argument(
        "--only",
        type=_subjects,
        default=list(SUBJECTS),
        metavar="SUBJECTS",
        help="separated by commas (all)",
    )
    parser.add_argument("--seconds", type=float, default=360, help="for the complete run (360)")
    places = f"bench/results; with --smoke {BUILD}"
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the JSON ({places})")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--compile", action="store_true", help="recorded steps compiled")
    chosen = parser.parse_args(arguments)
    run = Run(chosen.model, chosen.smoke, chosen.compile)
    folder = made_folder(parser, chosen.out or (BUILD if run.smoke else RESULTS))
    started = time.monotonic()
    report = Report(run, chosen.only, folder)
    for row in rows_of_all(chosen.only, run, started + chosen.seconds):
        report.add(row)
    report.finish(time.monotonic() - started)
    return 1 if report.failed else 0


def _subjects(text: str) -> list[str]:
    return names(text, SUBJECTS)


def rows_of_all(wanted: Sequence[str], run: Run, deadline: float) -> Iterator[Row]:
    """Yields one row for each job, group after group."""
    for group in GROUPS:
        subjects = [subject for subject in group if subject in wanted]
        if subjects:
            yield from rows_of_group(jobs_of(subjects, run.scale), run, deadline)


def rows_of_group(jobs: list[Job], run: Run, deadline: float) -> Iterator[Row]:
    """Yields one row for each job. If a process ends early, another one does the jobs that are
    left.
    """
    while jobs and time.monotonic() < deadline:
        child = Child(jobs, run, deadline)
        last = jobs[0]
        for row in child.rows():
            last, jobs = jobs[0], jobs[1:]
            yield row
        if jobs and time.monotonic() < deadline:
            if child.code != DEVICE_LOST:
                last, jobs = jobs[0], jobs[1:]
                yield last.row(error=f"its process ended early, with code {child.code}")
            if last.case == START:
                count = next((n for n, job in enumerate(jobs) if job.case == START), len(jobs))
                yield from (job.row(skipped=NOT_STARTED) for job in jobs[:count])
                jobs = jobs[count:]
            elif jobs and jobs[0].case != START:
                jobs = [Job(jobs[0].subject), *jobs]
    for job in jobs:
        yield job.row(skipped=OUT_OF_TIME)


class Child:
    """A process that does jobs. It does not outlive the deadline by more than `GRACE`."""

    def __init__(self, jobs: list[Job], run: Run, deadline: float) -> None:
        listed = json.dumps([(job.subject, asdict(job.case)) for job in jobs])
        self._command = [*COMMAND, "--jobs", listed, "--model", run.model]
        self._command += ["--deadline", str(deadline)]  # processes of a machine share the clock
        self._command += ["--smoke"] * run.smoke + ["--compile"] * run.compiled
        self._deadline = deadline
        self.code: int | None = None

    def rows(self) -> Iterator[Row]:
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # transformers asks its hub for kernels
        with subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",  # lines that others print
            env=offline,
            preexec_fn=_end_with_parent,
        ) as child:
            clock = threading.Timer(self._deadline + GRACE - time.monotonic(), child.kill)
            clock.start()
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith('{"subject"') and line.endswith("}\n"):  # complete
                        yield json.loads(line)
                    else:
                        print(line, end="", flush=True)
                self.code = child.wait()
            finally:
                clock.cancel()
                child.kill()  # no effect if it has ended


def _end_with_parent() -> None:
    """Runs in a child process before it starts, and has it end with its parent: nothing else would
    free the device.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
