"""Loading holds two copies of a model, and hardly more, in whatever number format it computes; a
difference that is kept small takes the memory it says, and its loading no more on top."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mi_runtime.config import DeltaDtype, Dtype
from mi_runtime.device.memory import MemoryPeak
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import check_pair
from tests.forked import ForkedProcess
from tests.runtime.conftest import PairOf

MIDSIZE = {  # 110 MB an endpoint in bf16: large beside what a process holds anyway
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
}
Directories = tuple[Path, Path]
WAYS: dict[str, tuple[Dtype, DeltaDtype]] = {
    "bfloat16": ("bfloat16", "none"),
    "float32": ("float32", "none"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}


def load_each_way(small: Directories, directories: Directories) -> int:
    """Prints what loading takes, for each way in a process of its own.

    These are forked when all code is there, and has run: code is no copy of a model.
    """
    for settings in WAYS.values():
        load_pair(check_pair(*small), "cpu", *settings)
    for settings in WAYS.values():
        if os.fork() == 0:
            pair, memory = check_pair(*directories), MemoryPeak(torch.device("cpu"))
            model = load_pair(pair, "cpu", *settings)
            memory.look()
            print(json.dumps([model.peak_bytes, model.weight_bytes, memory.peak]), flush=True)
            os._exit(0)
        os.wait()
    return 0


@dataclass(frozen=True)
class Loaded:
    """Bytes in a process that has loaded a pair."""

    peak: int  # held at once while it loaded
    stated: int  # what the model says it has
    held: int


@pytest.fixture(scope="module")
def directories(pair_of: PairOf) -> Directories:
    return pair_of("qwen3", dtype=torch.bfloat16, apart=0.1, **MIDSIZE)


@pytest.fixture(scope="module")
def loaded(
    qwen3_pair: Directories, directories: Directories, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loaded]:
    """By its way."""
    log = tmp_path_factory.mktemp("loaded") / "log"
    process = ForkedProcess(load_each_way, qwen3_pair, directories, log=log)
    assert process.wait() == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("[")]
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
    directories: Directories,
) -> None:
    """Thinking itself is mapped from its file, whose pages are the kernel's; no copy is made."""
    copy = (directories[0] / "model.safetensors").stat().st_size
    one = loaded[delta_dtype]
    assert one.stated / copy == pytest.approx(copies, abs=0.01)
    assert copies - 0.05 < one.held / copy < copies + 0.2
    assert one.peak / copy < copies + 0.2
