"""Compares `mi-server merge` of the mid-size pair with copying its two checkpoints.

    python -m bench.merge [--rounds N]

Both read the same files from the page cache, and end when their output is on the disk. The merge
row is the complete command, including the start of two Python processes; the row below it is only
the writing of the weights, in this process. It also prints the peak memory of a process that writes
them, including torch, without pages of mapped files.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
import torch

from bench.measuring.folders import BUILD
from bench.measuring.publishing import interleaved, publish
from bench.models.workloads import midsize_pair
from mi_runtime.model.merge_weights import Interpolation, write_weights
from mi_runtime.model.pair_check import check_pair
from mi_runtime.request import Dial

OUT = BUILD / "merged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pair = midsize_pair()
    endpoints = (Path(pair.instruct), Path(pair.thinking))
    values = interleaved(
        {
            "copy both checkpoints": lambda: timed(copy, *endpoints),
            "mi-server merge": lambda: timed(command, *endpoints),
            "weights alone": lambda: timed(weights, *endpoints),
        },
        arguments.rounds,
    )
    copied, merged, alone = (median(measured) for measured in values.values())
    publish("merge", "s", values, {
        "merge / copy": merged / copied,
        "weights alone / copy": alone / copied,
        "MiB held by the writing": memory_of_writing(*endpoints) / 2**20,
    })  # fmt: skip


def timed(run: Callable[[Path, Path], None], instruct: Path, thinking: Path) -> float:
    shutil.rmtree(OUT, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    run(instruct, thinking)
    os.sync()
    return time.perf_counter() - started


def copy(*endpoints: Path) -> None:
    for endpoint in endpoints:
        shutil.copytree(endpoint, OUT / endpoint.name)


def command(instruct: Path, thinking: Path) -> None:
    flags = ["--instruct", str(instruct), "--thinking", str(thinking), "--lambda", "0.6"]
    run = [sys.executable, "-m", "server.cli", "merge", *flags, "--out", str(OUT)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def weights(instruct: Path, thinking: Path) -> None:
    torch.set_num_threads(1)  # as the command does
    OUT.mkdir()
    pair = check_pair(instruct, thinking)
    write_weights(pair.instruct, pair.thinking, Interpolation(Dial(0.6)), OUT)


def memory_of_writing(*endpoints: Path) -> int:
    """Returns the peak private memory in bytes of a process that writes, sampled every 5 ms."""
    shutil.rmtree(OUT, ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=weights, args=endpoints)
    writer.start()
    process, peak = psutil.Process(writer.pid), 0
    while writer.is_alive():
        with suppress(psutil.Error):  # it ended between two samples
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.005)
    return peak


if __name__ == "__main__":
    main()
