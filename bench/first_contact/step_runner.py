"""Runs the steps of first contact one after another. Uses only the standard library."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench.carried.missing_packages import WHEELS, unpack_missing
from bench.first_contact.process_group import LONGEST_END, Ended, run_group
from bench.first_contact.record import Record
from bench.first_contact.steps import FOLDER, TIME, Step
from bench.gpu.cases import OUT_OF_TIME
from bench.measuring.folders import CHECKOUT

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
REHEARSING: Final = 3  # factor on the time of a step, for a machine that does other work too


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Inside its context, SIGINT and SIGTERM raise SystemExit, which also ends the running step."""

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
    """Returns the environment of the steps: this checkout, unpacked packages, and no network."""
    site = folder / "site"
    print(f"{len(unpack_missing(WHEELS, site))} packages unpacked from {WHEELS}", flush=True)
    path = [str(CHECKOUT), str(site)]
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
class StepRunner:
    """Runs steps one after another until the time is used up."""

    record: Record
    log: Path
    environment: Mapping[str, str]
    deadline: float
    smoke: bool
    folder: Path  # for files that nobody keeps

    def run_all(self, steps: Iterable[Step]) -> list[str]:
        """Runs the steps, and returns the names of all but those that this card cannot run.

        Partial ones run last, because the others give more information.
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
