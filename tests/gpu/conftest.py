"""Tests that need a GPU; where there is none, or Triton is interpreted, all of them are skipped.

`make gpu-test` runs them, on the machine's own packages, and has what became of them written to
`gpu-test.json`.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report import machine

DEVICE = "cuda"


@pytest.fixture(scope="session", autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is interpreted in this run: `make gpu-test` lets it compile")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Into the folder that the environment names, if it does."""
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
