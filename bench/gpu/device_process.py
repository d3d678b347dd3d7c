"""Does the jobs of the GPU bench on the device in order, and prints a row for each.

    python -m bench.gpu.device_process --jobs JSON --model NAME --deadline SECONDS [flags]

Every job has exactly one row, whatever happens: what it measured, an error, or why it was skipped.
So `supervisor.py`, which starts this process, knows from the rows in which job the process died.
"""

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from statistics import median

import torch

from bench.gpu.cases import (
    DEVICE_LOST,
    NOT_STARTED,
    OUT_OF_TIME,
    START,
    STORES,
    Case,
    Job,
    Row,
    Run,
    Skipped,
    Subject,
    message_of,
    off,
)
from bench.gpu.engine_rows import EngineRows, Measured
from bench.gpu.measured_card import FULL, SMALL, measure_card
from bench.gpu.memory_room import growth
from bench.gpu.transformers_rows import Batching, Generate
from bench.measuring.publishing import machine
from bench.models.random_pair import Place
from bench.models.shapes import SHAPES
from mi_runtime.kernels.triton_support import is_lost


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", required=True, help="JSON: pairs of a subject and a case")
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="of `time.monotonic`")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--compile", action="store_true", help="captured steps compiled")
    chosen = parser.parse_args()
    jobs = [Job(subject, Case(**case)) for subject, case in json.loads(chosen.jobs)]
    run = Run(chosen.model, chosen.smoke, chosen.compile)
    for row in rows_of(jobs, run, chosen.deadline):
        print(json.dumps(row), flush=True)
        if "error" in row and is_lost(place_of(run).device):
            return DEVICE_LOST
    return 0


def rows_of(jobs: Iterable[Job], run: Run, deadline: float) -> Iterator[Row]:
    subjects = Subjects(run)
    for job in jobs:
        if time.monotonic() > deadline:
            yield job.row(skipped=OUT_OF_TIME)
        else:
            yield subjects.row(job)
    subjects.end()


class Subjects:
    """Holds one subject at a time, which is freed before the next one begins."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._now: EngineRows | Batching | Generate | None = None

    def row(self, job: Job) -> Row:
        """Returns the row of one job. It never raises, because the other rows are wanted."""
        try:
            return job.row(**self._values(job))
        except Skipped as reason:
            return job.row(skipped=str(reason))
        except Exception as error:
            message = message_of(error)
        give_memory_back()  # the error referenced frames, which referenced tensors
        return job.row(error=message)

    def end(self) -> None:
        self._now = None
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()  # compiled code keeps the model it was compiled for in memory
        give_memory_back()

    def _values(self, job: Job) -> Row:
        if job.case == START:
            self.end()
            return {"machine": machine_facts(), **self._start(job.subject)}
        if self._now is None:
            raise Skipped(NOT_STARTED)
        return values_of(self._now.measure(job.case))

    def _start(self, subject: Subject) -> Row:
        run, place = self._run, place_of(self._run)
        if place.device.type == "cpu" and not run.smoke:
            raise RuntimeError("there is no CUDA device; --smoke runs tiny shapes on a CPU")
        if subject == "card":
            return {"card": asdict(measure_card(place.device, SMALL if run.smoke else FULL))}
        if subject in STORES:
            rows = EngineRows(run.shape, subject, place, run.scale, run.compiled)
            self._now = rows
            facts = rows.facts()
            return {"engine": facts, **off(facts, run, place.device.type)}
        started = time.perf_counter()
        self._now = (Batching if subject == "batching" else Generate)(run.shape, place, run.scale)
        return {"start_seconds": time.perf_counter() - started}


def values_of(measured: Measured) -> Row:
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


def place_of(run: Run) -> Place:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Place(device, dtype, positions=run.scale.context + growth(run.scale))


def machine_facts() -> Row:
    return {**machine(), "cuda": torch.version.cuda, "triton": version_of("triton")}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
