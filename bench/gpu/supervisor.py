"""Runs the jobs of the GPU bench in processes, and starts another one if a process dies.

No torch: this process never uses the device, so it survives whatever happens there.
"""

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
from typing import Final

from bench.gpu.cases import (
    DEVICE_LOST,
    GROUPS,
    NOT_STARTED,
    OUT_OF_TIME,
    START,
    Job,
    Row,
    Run,
    jobs_of,
)

GRACE: Final = 5  # seconds that a row in progress may still take after the deadline
PR_SET_PDEATHSIG: Final = 1  # option of Linux's prctl
COMMAND: Final = (sys.executable, "-m", "bench.gpu.device_process")


def rows_of_all(wanted: Sequence[str], run: Run, deadline: float) -> Iterator[Row]:
    """Yields one row for each job, group after group."""
    for group in GROUPS:
        subjects = [subject for subject in group if subject in wanted]
        if subjects:
            yield from rows_of_group(jobs_of(subjects, run.scale), run, deadline)


def rows_of_group(jobs: list[Job], run: Run, deadline: float) -> Iterator[Row]:
    """Yields one row for each job. If a process ends early, another one does the rest."""
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
    """Runs in a child process before it starts, and makes it end with its parent.

    Nothing else would free the device.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
