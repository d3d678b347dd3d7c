"""Loading a pair holds little more than two copies of a model, or one copy and a rounded delta."""

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

MIDSIZE = {  # 110 MB an endpoint in bf16: large compared with the rest of the process
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
    """Prints the bytes that loading takes, for each way in its own process.

    These are forked after every way has loaded a small pair, so that code does not count.
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
    """Bytes of a process that has loaded a pair."""

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
    """Returns the bytes of each way, each measured in its own process."""
    log = tmp_path_factory.mktemp("loaded") / "log"
    process = ForkedProcess(load_each_way, qwen3_pair, directories, log=log)
    assert process.wait() == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("[")]
    return {way: Loaded(*json.loads(line)) for way, line in zip(WAYS, lines, strict=True)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_more_than_2_2_copies(dtype: str, loaded: dict[str, Loaded]) -> None:
    one = loaded[dtype]
    assert 1.7 < one.peak / (one.stated / 2) < 2.2


@pytest.mark.parametrize(("delta_dtype", "copies"), [("int8", 1.5), ("int4", 1.27)])
def test_a_rounded_delta_takes_the_stated_memory_and_loading_little_more(
    delta_dtype: DeltaDtype,
    copies: float,
    loaded: dict[str, Loaded],
    directories: Directories,
) -> None:
    """Thinking's weights are mapped from their file, so that they are no copy of the process."""
    copy = (directories[0] / "model.safetensors").stat().st_size
    one = loaded[delta_dtype]
    assert one.stated / copy == pytest.approx(copies, abs=0.01)
    assert copies - 0.05 < one.held / copy < copies + 0.2
    assert one.peak / copy < copies + 0.2
