"""The kernels as the compiler makes them for a Hopper GPU (9.0), none of which is needed for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
SHARED_BYTES = 227 * 1024  # what a program may have of an H100's or H200's
KERNELS = {"attend_kernel", "add_parts_kernel", "write_kernel", "_product", "_sum_splits"}
REGISTERS = 65_536 // 256  # of a thread, where a program has eight warps


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    """What each launch takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.runtime.kernels.ahead_of_time", "90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_fits_and_keeps_its_numbers_in_registers(
    launches: list[dict[str, Any]],
) -> None:
    assert {taken["kernel"] for taken in launches} == KERNELS
    for taken in launches:
        assert taken["shared"] <= SHARED_BYTES, taken
        assert taken["registers"] < REGISTERS, taken
        assert taken["spilled"] == 0, taken


def test_two_programs_of_a_decode_fit_a_processor_at_once(launches: list[dict[str, Any]]) -> None:
    """One loads while the other computes."""
    decodes = [taken for taken in attending(launches) if taken["case"].startswith("decode")]
    assert len(decodes) == 3
    assert max(taken["shared"] for taken in decodes) * 2 <= SHARED_BYTES


def test_the_next_tile_is_on_its_way_while_one_is_computed(launches: list[dict[str, Any]]) -> None:
    """The compiler sees to it only where it has the addresses early: so the table is read ahead."""
    assert len(attending(launches)) == 6
    for taken in attending(launches):
        assert taken["in_flight"] == 2, taken  # keys and values of one tile


def attending(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [taken for taken in launches if taken["kernel"] == "attend_kernel"]
