"""Loading holds two copies of a model, and hardly more, in whatever number format it computes; a
difference that is kept small takes the memory it says, and its loading no more on top."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mi_runtime.config import DeltaDtype

MIDSIZE = {  # 160 MB an endpoint in bf16: large beside what a process holds anyway
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
}
LOAD = """
import json, sys
import torch
from transformers import Qwen3ForCausalLM  # code is no copy of a model
from mi_runtime.model.load import load_pair
from mi_runtime.device.memory import MemoryPeak
from mi_runtime.model.pair_check import check_pair

pair, memory = check_pair(*sys.argv[1:3]), MemoryPeak(torch.device("cpu"))
model = load_pair(pair, "cpu", *sys.argv[3:])
memory.look()
print(json.dumps([model.peak_bytes, model.weight_bytes, memory.peak]))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_more_than_two_copies_and_a_fifth(
    dtype: str, pair_of: Callable[..., tuple[Path, Path]]
) -> None:
    directories = pair_of("qwen3", dtype=torch.bfloat16, apart=0.1, **MIDSIZE)
    peak, both_endpoints, _ = loaded(directories, dtype)
    assert 1.7 < peak / (both_endpoints / 2) < 2.2


@pytest.mark.parametrize(("delta_dtype", "copies"), [("int8", 1.5), ("int4", 1.27)])
def test_a_small_difference_takes_the_memory_it_says_and_loading_hardly_more(
    delta_dtype: DeltaDtype, copies: float, pair_of: Callable[..., tuple[Path, Path]]
) -> None:
    """Thinking itself is mapped from its file, whose pages are the kernel's; no copy is made."""
    directories = pair_of("qwen3", dtype=torch.bfloat16, apart=0.1, **MIDSIZE)
    copy = (directories[0] / "model.safetensors").stat().st_size
    peak, told, held = loaded(directories, "bfloat16", delta_dtype)
    assert told / copy == pytest.approx(copies, abs=0.01)
    assert copies - 0.05 < held / copy < copies + 0.2
    assert peak / copy < copies + 0.2


def loaded(directories: tuple[Path, Path], *settings: str) -> list[int]:
    """Bytes in a process that loads a pair: peak of loading, what the model says it has, and what
    is held when it is there."""
    command = [sys.executable, "-c", LOAD, *map(str, directories), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes: list[int] = json.loads(done.stdout)
    return sizes
