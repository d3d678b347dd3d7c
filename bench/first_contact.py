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
step fail; so does an engine that runs on a GPU without recorded decode steps or without kernels. A
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
- recording and replaying CUDA graphs, and compiling what is recorded with inductor for CUDA;
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
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench.arguments import made_folder, names
from bench.contact_carried import WHEELS, unpack_missing
from bench.contact_process import LONGEST_END, Ended, run_group
from bench.contact_record import Record, StepRecord, steps_of
from bench.gpu_cases import OUT_OF_TIME

ROOT: Final = Path(__file__).parents[1]
NAME: Final = "first_contact"
SECONDS: Final = 540
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
REHEARSING: Final = 3  # factor on the time of a step, for a machine that does other work too
TIME, FOLDER = "{seconds}", "{folder}"  # in a command: its time limit, and its output folder


@dataclass(frozen=True, slots=True)
class Step:
    """One process, `python -m …`, with its arguments and limits."""

    letter: str
    name: str
    command: tuple[str, ...]
    limit: int  # seconds
    least: int  # seconds left that make a start worthwhile
    memory: int = 0  # GiB of memory that the card must have
    margin: int = 10  # seconds between the deadline it gets and its end by force
    smoke: tuple[str, ...] = ("--smoke",)  # what a rehearsal adds


def gpu(*flags: str, model: str = "4b") -> tuple[str, ...]:
    return ("bench.gpu", "--model", model, *flags, "--seconds", TIME, "--out", FOLDER)


SERVED: Final = ("bench.gpu_served", "--model", "4b", "--seconds", TIME, "--out", FOLDER)
STEPS: Final = (
    Step("a", "environment", ("bench.contact_environment",), 90, 10),
    Step("b", "kernels", ("bench.contact_tests", "kernels"), 75, 20),
    Step("c", "engine", ("bench.contact_tests", "engine"), 90, 30),
    Step("d", "pair", gpu("--only", "card,static,pair"), 150, 60),
    Step("e", "http", SERVED, 150, 80, margin=95),  # limit in seconds, counted from its start
    Step("f", "deltas", gpu("--only", "int8,int4"), 80, 40),
    Step("g", "batching", gpu("--only", "batching"), 60, 30),
    Step("h", "experts", gpu("--only", "card,static,pair", model="30b-a3b"), 150, 80, memory=130),
    Step("i", "compiled", gpu("--compile", "--only", "card,static,pair"), 150, 90),
    Step("j", "profile", ("bench.contact_profile",), 75, 30),
)


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
        contact = Contact(record, log, environment, deadline, chosen.smoke, Path(folder))
        try:
            to_run = contact.run_all(wanted)
        finally:
            print(*record.ratios(chosen.smoke), sep="\n")
            print(record.table([step.name for step in steps]), flush=True)
    return 0 if all(map(record.is_ok, to_run)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    """Renames the file of an earlier run to the next free name."""
    if path.exists():
        others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
        shutil.copy(path, next(other for other in others if not other.exists()))


@contextmanager
def ended_in_order() -> Iterator[None]:
    """When this process is asked to end, ends the running step's group too, and prints the
    table.
    """

    def end(number: int, frame: object) -> None:
        for other in SIGNALS:  # a second signal would interrupt the ending
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment_of(folder: Path, smoke: bool) -> dict[str, str]:
    """Returns the environment of the steps: this checkout, the files that were copied, and no
    network.
    """
    site = folder / "site"
    print(f"{len(unpack_missing(WHEELS, site))} packages unpacked from {WHEELS}", flush=True)
    path = [str(ROOT), str(site)]
    if "PYTHONPATH" in os.environ:
        path.append(os.environ["PYTHONPATH"])
    changed = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # as in the server: threads that spin occupy cores
        "TRITON_INTERPRET": "1" if smoke else "0",
    }
    if smoke:
        # Threads that wait for each other lose time to anything else that runs here.
        changed |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changed}


@dataclass(frozen=True, slots=True)
class Contact:
    """Runs steps one after another until the time is used up."""

    record: Record
    log: Path
    environment: Mapping[str, str]
    deadline: float
    smoke: bool
    folder: Path  # for files that nobody keeps

    def run_all(self, steps: Iterable[Step]) -> list[str]:
        """Runs the steps, partial ones last, because the others give more information. Returns the
        names of the steps that should run: all but those that this card cannot run.
        """
        self.log.touch()
        to_run = []
        for step in sorted(steps, key=lambda step: self.record.status(step.name) == "partial"):
            if reason := self.reason_against(step):
                self.record.leave_out(step.name, reason)
            else:
                to_run.append(step.name)
                self.run(step)
        return to_run

    def reason_against(self, step: Step) -> str | None:
        """Returns why this card cannot run the step, if that is known in advance."""
        if self.smoke or not step.memory:
            return None
        has = card_memory()
        if has is None or has >= step.memory:
            return None
        return f"takes {step.memory} GiB, the card has {has}"

    def run(self, step: Step) -> None:
        """Runs the step, unless it was ok already or no time is left for it."""
        if self.record.is_ok(step.name):
            return
        limit = step.limit * (REHEARSING if self.smoke else 1)
        seconds = min(limit, self.deadline - time.monotonic() - LONGEST_END)
        if seconds < step.least:
            self.record.leave_out(step.name, OUT_OF_TIME)
        else:
            self._run(step, seconds)

    def _run(self, step: Step, seconds: float) -> None:
        command = list(self._command(step, seconds))
        self._say(f"{step.letter} {step.name}: {' '.join(command[1:])}")
        self.record.begin(step.name, command[1:])
        started, ended = time.monotonic(), None
        add = partial(self.record.add, step.name)
        try:
            ended = run_group(command, self.environment, seconds, self.log, add)
        finally:
            interrupted = Ended("failed", time.monotonic() - started, "interrupted")
            self.record.end(step.name, ended or interrupted)
            earlier = self.record.steps[step.name]
            self._say(f"{step.letter} {step.name}: {earlier['status']} {earlier['seconds']} s")

    def _command(self, step: Step, seconds: float) -> Iterator[str]:
        yield from (sys.executable, "-m")
        for word in (*step.command, *(step.smoke if self.smoke else ())):
            word = word.replace(TIME, f"{max(1, seconds - step.margin):.0f}")
            yield word.replace(FOLDER, str(self.folder / step.name))

    def _say(self, line: str) -> None:
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(f"=== {line}\n")


def card_memory() -> int | None:
    """Returns the GiB of the first GPU, or None if nvidia-smi does not report it."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout
        return round(int(output.split()[0]) / 1024)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
