"""Tests that need a GPU. Without one, or if Triton is interpreted, all of them are skipped.

`make gpu-test` runs them with the packages that `PYTHON` has, and writes the outcomes to
`gpu-test.json`. With `GPU_REHEARSAL=1`, all but those marked `on_a_gpu_only` run on a CPU at tiny
shapes with interpreted kernels, so that no test fails on a GPU because of a mistake of its own.

Uninitialized memory is NaN here (for integers, the largest number), so that a kernel which leaves
out a part of its result cannot be right by luck.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measuring.publishing import machine

REHEARSED = os.environ.get("GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSED else "cuda"
on_a_gpu_only = pytest.mark.skipif(REHEARSED, reason="rehearsed without a GPU")


@pytest.fixture(scope="session", autouse=True)
def _on_a_gpu() -> None:
    if REHEARSED:
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is interpreted in this run: `make gpu-test` lets it compile")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in the engine


@pytest.fixture
def poisoned(_on_a_gpu: None) -> Iterator[None]:
    """Fills uninitialized memory, which torch does only for deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _ends_with_what_it_launched(_on_a_gpu: None) -> Iterator[None]:
    """Waits for the device, so that an error there fails the test that caused it.

    No other test can run in this process after that. A worker of pytest-xdist ends here, and
    another one takes its place; a single process ends the run."""
    yield
    if REHEARSED:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the device cannot be used any more: {error}", returncode=1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes the outcomes into the folder `GPU_OUT`, if the environment names one."""
    folder = os.environ.get("GPU_OUT")
    if folder is None:
        return
    outcomes = {
        outcome: {
            report.nodeid: str(report.longrepr)[-2000:] if report.longrepr else ""
            for report in terminalreporter.getreports(outcome)
        }
        for outcome in ("failed", "error", "skipped")
    }
    passed = len(terminalreporter.getreports("passed"))
    record = {"tests": "gpu", "machine": machine(), "passed": passed, **outcomes}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "gpu-test.json").write_text(json.dumps(record) + "\n")
