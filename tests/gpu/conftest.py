"""Tests that need a GPU; where there is none, or Triton is interpreted, all of them are skipped.

`make gpu-test` runs them, on the machine's own packages.
"""

import os

import pytest
import torch

DEVICE = "cuda"


@pytest.fixture(scope="session", autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is interpreted in this run: `make gpu-test` lets it compile")
