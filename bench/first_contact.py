"""The first fifteen minutes on a GPU: everything to be known of it, in order of value, in one call.

    python -m bench.first_contact --out DIR                       9 minutes at most
    python -m bench.first_contact --out DIR --resume DIR/first_contact.json     what is left
    python -m bench.first_contact --smoke                         rehearsed on a CPU, tiny shapes

Each step is a process group of its own with its own limit: one that fails, hangs or breaks its CUDA
context costs no other. A step starts only if `least` seconds are left, and what it may take is cut
to what is left. DIR gets two files, whole at any moment: `first_contact.json` with every row of
every step, `first_contact.log` with all else that they said. Last come the ratios that are aimed
at, and one table. The exit code is 0 only if every step that was to run is ok; a row that tells of
an error is a failure of its step, and an engine on a GPU without recorded decode steps, or without
kernels, is such an error.

It needs Python's standard library alone, so that a torch that does not import is told like any
other failure. What the machine lacks comes from `.wheels/`, where that folder is there: packages as
wheels (`make gpu-wheels`), which are unpacked for the steps and not installed, and compiled kernels
(`make gpu-kernels`).

What cannot be rehearsed without a GPU, and runs for the first time on the day:

- a launch of compiled Triton code: here kernels are interpreted, and `bench.kernel_code` compiles
  them for sm_90 without running them; a read out of bounds shows on a GPU only;
- kernels in bf16 and fp16 with the arithmetic of the matrix units (interpreted: in fp32);
- recording and replaying CUDA graphs, and compiling what is recorded by inductor for CUDA;
- copies from pinned memory, streams and events, and what overlaps: on a CPU the device is the host;
- the choice of attention backend and of pair kernels by time, sizing by the memory that is free,
  and running out of it;
- the shapes of real models: 4B and 30B-A3B pairs, contexts of 8k, batches of 128;
- the machine's own versions of packages whose versions are not known (`bench/gpu_machine.txt`), its
  numpy, with which Triton 3.6 does not interpret, and its C compiler;
- `nvidia-smi`, the profiler's view of the device, and `ncu`.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.contact_carried import WHEELS, unpack_missing
from bench.contact_process import Ended, run_group
from bench.contact_record import Record

ROOT: Final = Path(__file__).parents[1]
NAME: Final = "first_contact"
SECONDS: Final = 540
ENDING: Final = 5  # seconds that ending a group may take
REHEARSING: Final = 3  # times as long a step may take, on a machine that does other work beside
TIME, FOLDER = "{seconds}", "{folder}"  # in a command: what it may take, and where it may write


@dataclass(frozen=True, slots=True)
class Step:
    """One process: `python -m …`, and what it is given."""

    letter: str
    name: str
    command: tuple[str, ...]
    limit: int  # seconds
    least: int  # seconds with which it is still worth starting
    memory: int = 0  # GiB that the card must have
    margin: int = 10  # seconds that it is ended later than it is told to be done
    smoke: tuple[str, ...] = ("--smoke",)  # what a rehearsal adds


def gpu(*flags: str, model: str = "4b") -> tuple[str, ...]:
    return ("bench.gpu", "--model", model, *flags, "--seconds", TIME, "--out", FOLDER)


SERVED: Final = ("bench.gpu_served", "--model", "4b", "--seconds", TIME, "--out", FOLDER)
STEPS: Final = (
    Step("a", "environment", ("bench.contact_environment",), 50, 10),
    Step("b", "kernels", ("bench.contact_tests", "kernels"), 75, 20),
    Step("c", "engine", ("bench.contact_tests", "engine"), 90, 30),
    Step("d", "pair", gpu("--only", "card,static,pair"), 150, 60),
    Step("e", "http", SERVED, 120, 80, margin=80),  # its seconds are those behind its start
    Step("f", "deltas", gpu("--only", "int8,int4"), 80, 40),
    Step("g", "batching", gpu("--only", "batching"), 60, 30),
    Step("h", "experts", gpu("--only", "card,static,pair", model="30b-a3b"), 150, 80, memory=130),
    Step("i", "compiled", gpu("--compile", "--only", "card,static,pair"), 150, 90),
    Step("j", "profile", ("bench.contact_profile",), 75, 30),
)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    chosen = _parser().parse_args(arguments)
    if chosen.list:
        print("\n".join(f"{step.letter} {step.name:<12} {step.limit:>4} s" for step in steps))
        return 0
    wanted = [step for step in steps if _is_wanted(step, chosen.only)]
    chosen.out.mkdir(parents=True, exist_ok=True)
    record = Record(chosen.out / f"{NAME}.json", chosen.resume)
    log = chosen.out / f"{NAME}.log"
    log.touch()
    with ended_in_order(), tempfile.TemporaryDirectory(prefix=NAME) as folder:
        environment = environment_of(Path(folder), chosen.smoke)
        deadline = time.monotonic() + chosen.seconds
        try:
            contact = Contact(record, log, environment, deadline, chosen.smoke, Path(folder))
            left_out = [step.name for step in wanted if not contact.run(step)]
        finally:
            print(*record.ratios(chosen.smoke), sep="\n")
            print(record.table([step.name for step in steps]), flush=True)
    to_run = [step.name for step in wanted if step.name not in left_out]
    return 0 if all(map(record.is_ok, to_run)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/first_contact"), help="folder")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all together")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="an earlier JSON")
    parser.add_argument("--only", metavar="a,c", help="letters or names of steps")
    parser.add_argument("--list", action="store_true", help="name the steps, and end")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    return parser


def _is_wanted(step: Step, only: str | None) -> bool:
    return only is None or bool({step.letter, step.name} & set(only.split(",")))


@contextmanager
def ended_in_order() -> Iterator[None]:
    """A process that is asked to end takes its step's group along, and prints its table."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment_of(folder: Path, smoke: bool) -> dict[str, str]:
    """What steps see: this checkout, what was carried for them, and no network."""
    site = folder / "site"
    print(f"{len(unpack_missing(WHEELS, site))} packages unpacked from {WHEELS}", flush=True)
    path = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "1" if smoke else "0",
    }
    if smoke:
        # Threads that wait for each other lose their time to whatever else runs here.
        changed |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changed}


@dataclass(frozen=True, slots=True)
class Contact:
    """Steps one after another, until the time is over."""

    record: Record
    log: Path
    environment: Mapping[str, str]
    deadline: float
    smoke: bool
    folder: Path  # of files that nobody keeps

    def run(self, step: Step) -> bool:
        """Whether the step was to run."""
        if self.record.is_ok(step.name):
            return True
        has = 0 if self.smoke or not step.memory else card_memory()
        if not self.smoke and has < step.memory:
            self.record.leave_out(step.name, f"takes {step.memory} GiB, the card has {has}")
            return False
        limit = step.limit * (REHEARSING if self.smoke else 1)
        seconds = min(limit, self.deadline - time.monotonic() - ENDING)
        if seconds < step.least:
            self.record.leave_out(step.name, "out of time")
            return True
        self._run(step, seconds)
        return True

    def _run(self, step: Step, seconds: float) -> None:
        command = list(self._command(step, seconds))
        self._say(f"{step.letter} {step.name}: {' '.join(command[1:])}")
        self.record.begin(step.name, command[1:])
        ended = Ended("failed", 0.0, "interrupted")
        try:
            ended = run_group(
                *(command, self.environment, seconds, self.log),
                lambda row: self.record.add(step.name, row),
            )
        finally:
            self.record.end(step.name, ended)
            told = self.record.steps[step.name]
            self._say(f"{step.letter} {step.name}: {told['status']} {told['seconds']} s")

    def _command(self, step: Step, seconds: float) -> Iterator[str]:
        yield from (sys.executable, "-m")
        for word in (*step.command, *(step.smoke if self.smoke else ())):
            word = word.replace(TIME, f"{max(1, seconds - step.margin):.0f}")
            yield word.replace(FOLDER, str(self.folder / step.name))

    def _say(self, line: str) -> None:
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(f"=== {line}\n")


def card_memory() -> int:
    """GiB of the first GPU; 0 where nothing tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return round(int(told.split()[0]) / 1024)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
