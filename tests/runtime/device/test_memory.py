"""Loading holds two copies of a model, and hardly more, in whatever number format it computes; a
difference that is kept small takes the memory it says, and its loading no more on top."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mi_runtime.config import DeltaDtype
from tests.runtime.conftest import PairOf

MIDSIZE = {  # 160 MB an endpoint in bf16: large beside what a process holds anyway
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
}
WAYS = {
    "bfloat16": ("bfloat16", "none"),
    "float32": ("float32", "none"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
# Each way in a process of its own, which is forked when all code is there: code is no copy of a
# model.
LOAD = """
import json, os, sys
import torch
from transformers import Qwen3ForCausalLM
from mi_runtime.model.load import load_pair
from mi_runtime.device.memory import MemoryPeak
from mi_runtime.model.pair_check import check_pair

for settings in json.loads(sys.argv[3]):
    if os.fork() == 0:
        pair, memory = check_pair(*sys.argv[1:3]), MemoryPeak(torch.device("cpu"))
        model = load_pair(pair, "cpu", *settings)
        memory.look()
        print(json.dumps([model.peak_bytes, model.weight_bytes, memory.peak]), flush=True)
        os._exit(0)
    os.wait()
"""


@dataclass(frozen=True)
class Loaded:
    """Bytes in a process that has loaded a pair."""

    peak: int  # held at once while it loaded
    stated: int  # what the model says it has
    held: int


@pytest.fixture(scope="module")
def directories(pair_of: PairOf) -> tuple[Path, Path]:
    return pair_of("qwen3", dtype=torch.bfloat16, apart=0.1, **MIDSIZE)


@pytest.fixture(scope="module")
def loaded(directories: tuple[Path, Path]) -> dict[str, Loaded]:
    """By its way."""
    settings = json.dumps(list(WAYS.values()))
    command = [sys.executable, "-c", LOAD, *map(str, directories), settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return {way: Loaded(*json.loads(line)) for way, line in zip(WAYS, lines, strict=True)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_more_than_two_copies_and_a_fifth(
    dtype: str, loaded: dict[str, Loaded]
) -> None:
    one = loaded[dtype]
    assert 1.7 < one.peak / (one.stated / 2) < 2.2


@pytest.mark.parametrize(("delta_dtype", "copies"), [("int8", 1.5), ("int4", 1.27)])
def test_a_small_difference_takes_the_memory_it_says_and_loading_hardly_more(
    delta_dtype: DeltaDtype,
    copies: float,
    loaded: dict[str, Loaded],
    directories: tuple[Path, Path],
) -> None:
    """Thinking itself is mapped from its file, whose pages are the kernel's; no copy is made."""
    copy = (directories[0] / "model.safetensors").stat().st_size
    one = loaded[delta_dtype]
    assert one.stated / copy == pytest.approx(copies, abs=0.01)
    assert copies - 0.05 < one.held / copy < copies + 0.2
    assert one.peak / copy < copies + 0.2
