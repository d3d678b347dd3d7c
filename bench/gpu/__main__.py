"""Measures the engine on a GPU against the card's own limits, on random pairs of real shapes.

    python -m bench.gpu [--model NAME] [--only static,pair,…] [--seconds 360] [--out DIR]
    python -m bench.gpu --compile --only card,static,pair      captured steps compiled
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
come in order of importance (`bench/gpu/cases.py`), and the JSON is written after each. Subjects
that share a process run one after another. If the process dies, the row in progress becomes an
error and a new process runs the rest. A row that fails reports the error, and the next one runs; a
row without room or time reports that it was skipped. An engine that runs without CUDA graphs or
without kernels is an error, though its rows are measured. The exit code is 1 if there was any
error, or if every row was skipped.

Each row is printed as a line of JSON that begins with `{"subject"`, and as a line to read.
`bounds.py` in this package explains the bounds, `engine_rows.py` how rows are timed.
"""

import argparse
import sys
import time
from pathlib import Path

from bench.gpu.cases import (
    SUBJECTS,
    Run,
)
from bench.gpu.report import Report
from bench.gpu.supervisor import rows_of_all
from bench.measuring.arguments import made_folder, names
from bench.measuring.folders import BUILD, RESULTS
from bench.models.shapes import SHAPES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    parser.add_argument("--compile", action="store_true", help="captured steps compiled")
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


if __name__ == "__main__":
    sys.exit(main())
