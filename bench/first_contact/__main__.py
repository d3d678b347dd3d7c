"""First contact with a GPU: runs every check and measurement on it, the most valuable first.

    python -m bench.first_contact --out DIR                       9 minutes at most
    python -m bench.first_contact --out DIR --resume DIR/first_contact.json     what is left
    python -m bench.first_contact --smoke                         rehearsed on a CPU, tiny shapes

Each step is a separate process group with a time limit: a step that fails, hangs or breaks its CUDA
context does not affect the others. A step starts only if at least `least` seconds are left, and its
limit is cut to what is left. DIR gets two files, which are complete at any moment:
`first_contact.json` with every row of every step, and `first_contact.log` with all other output.
The JSON of an earlier run is kept as `first_contact-1.json`, and so on. At the end it prints the
ratios that have targets, and one table.

The exit code is 0 only if every step that should run is ok. A row that reports an error makes its
step fail; so does an engine that runs on a GPU without CUDA graphs or without kernels. A
step that skipped rows for lack of time is `partial`, and runs again after all others when the run
is resumed. A step that needs more memory than the card has is left out.

This module uses only the standard library, so that a torch that does not import is reported like
any other failure. Files that the GPU machine lacks come from `.wheels/`, if that folder exists:
packages as wheels (`make gpu-wheels`), which are unpacked for the steps and not installed, and
compiled kernels (`make gpu-kernels`).

The following cannot be rehearsed without a GPU, and runs there for the first time:

- launches of compiled Triton code: on a CPU kernels are interpreted, and `bench.kernel_code`
  compiles them for sm_90 without running them; a read out of bounds shows only on a GPU;
- kernels in bf16 and fp16 with the arithmetic of the matrix units (interpreted: in fp32);
- capturing and replaying CUDA graphs, and compiling what is captured with inductor for CUDA;
- copies from pinned memory, streams, events and their overlap: on a CPU the device is the host;
- choosing the attention backend and the pair kernels by time, sizing by free memory, and running
  out of memory;
- the shapes of real models: 4B and 30B-A3B pairs, contexts of 8k, batches of 128;
- the GPU machine's packages for which `bench/gpu_machine.txt` has no version, its numpy, with which
  Triton 3.6 does not interpret, and its C compiler;
- `nvidia-smi`, the profiler's view of the device, and `ncu`.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from bench.first_contact.record import Record, StepRecord, steps_of
from bench.first_contact.step_runner import StepRunner, ended_in_order, environment_of
from bench.first_contact.steps import STEPS, Step
from bench.measuring.arguments import made_folder, names

NAME: Final = "first_contact"
SECONDS: Final = 540


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(f"{step.letter} {step.name:<12} {step.limit:>4} s" for step in steps))
        return 0
    wanted = _wanted(parser, chosen.only, steps)
    earlier = _earlier(parser, chosen.resume)
    path = made_folder(parser, chosen.out) / f"{NAME}.json"
    _keep_earlier(path)
    record = Record(path, earlier)
    record.write()
    with ended_in_order(), tempfile.TemporaryDirectory(prefix=NAME) as folder:
        environment = environment_of(Path(folder), chosen.smoke)
        deadline = time.monotonic() + chosen.seconds
        log = path.with_suffix(".log")
        runner = StepRunner(record, log, environment, deadline, chosen.smoke, Path(folder))
        try:
            to_run = runner.run_all(wanted)
        finally:
            print(*record.ratios(chosen.smoke), sep="\n")
            print(record.table([step.name for step in steps]), flush=True)
    return 0 if all(map(record.is_ok, to_run)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_contact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = Path("build/first_contact")
    parser.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help=f"folder of both files ({out})"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all steps together ({SECONDS})"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="JSON of an earlier run: steps that were ok there do not run",
    )
    parser.add_argument("--only", metavar="STEPS", help="letters or names, separated by commas")
    parser.add_argument("--list", action="store_true", help="list the steps, and exit")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    return parser


def _wanted(
    parser: argparse.ArgumentParser, only: str | None, steps: Sequence[Step]
) -> Iterable[Step]:
    if only is None:
        return steps
    known = [name for step in steps for name in (step.letter, step.name)]
    try:
        wanted = set(names(only, known))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --only: {error}")
    return [step for step in steps if {step.letter, step.name} & wanted]


def _earlier(parser: argparse.ArgumentParser, file: Path | None) -> dict[str, StepRecord]:
    if file is None:
        return {}
    try:
        return steps_of(file)
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {file}: {error}")


def _keep_earlier(path: Path) -> None:
    """Copies the file of an earlier run to the next free name."""
    if path.exists():
        others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
        shutil.copy(path, next(other for other in others if not other.exists()))


if __name__ == "__main__":
    sys.exit(main())
