"""The kernels as the compiler makes them for a Hopper GPU (9.0), none of which is needed for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
SHARED_BYTES = 227 * 1024  # what a program may have of an H100's or H200's
REGISTERS = 65_536 // 256  # of a thread, where a program has eight warps


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, int]]:
    """What each kernel takes, by its name."""
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
    return {one.pop("kernel"): one for one in map(json.loads, done.stdout.splitlines())}


def test_every_kernel_fits_and_keeps_its_numbers_in_registers(
    kernels: dict[str, dict[str, int]],
) -> None:
    assert len(kernels) == 8
    for name, taken in kernels.items():
        assert taken["shared"] <= SHARED_BYTES, name
        assert taken["registers"] < REGISTERS, name
        assert taken["spilled"] == 0, name


def test_two_programs_of_a_decode_fit_a_processor_at_once(
    kernels: dict[str, dict[str, int]],
) -> None:
    """One loads while the other computes."""
    decodes = [taken for name, taken in kernels.items() if name.startswith("decode")]
    assert max(taken["shared"] for taken in decodes) * 2 <= SHARED_BYTES


def test_the_next_tile_is_on_its_way_while_one_is_computed(
    kernels: dict[str, dict[str, int]],
) -> None:
    """The compiler sees to it only where it has the addresses early: so the table is read ahead."""
    walking = [taken for name, taken in kernels.items() if name.startswith(("decode", "prefill"))]
    assert len(walking) == 6
    assert all(taken["in_flight"] == 2 for taken in walking)  # keys and values of one tile
