"""Loading holds two copies of a model, and hardly more, in whatever number format it computes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
from transformers import Qwen3ForCausalLM  # code is no copy of a model
from mi_runtime.load import load_pair
from mi_runtime.pair import check_pair

model = load_pair(check_pair(*sys.argv[1:3]), "cpu", sys.argv[3])
print(json.dumps([model.peak_bytes, model.weight_bytes]))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_more_than_two_copies_and_a_fifth(
    dtype: str, pair_of: Callable[..., tuple[Path, Path]]
) -> None:
    directories = pair_of("qwen3", dtype=torch.bfloat16, **MIDSIZE)
    command = [sys.executable, "-c", LOAD, *map(str, directories), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, both_endpoints = json.loads(done.stdout)
    assert 1.7 < peak / (both_endpoints / 2) < 2.2
