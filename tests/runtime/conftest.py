"""Pairs on disk, each built once a session, and engines over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from tests.runtime import oracle
from tests.runtime.families import write_pair

PairOf = Callable[..., tuple[Path, Path]]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PairOf]:
    """`pair_of(family, **changes)`: the directories of a random pair, the same one every time."""

    pairs: dict[str, tuple[Path, Path]] = {}

    def pair(family: str, **changes: Any) -> tuple[Path, Path]:
        name = f"{family} {changes}"
        if name not in pairs:
            pairs[name] = write_pair(tmp_path_factory.mktemp(family), family, **changes)
        return pairs[name]

    yield pair
    oracle.endpoint.cache_clear()


@pytest.fixture(scope="session")
def qwen3_pair(pair_of: PairOf) -> tuple[Path, Path]:
    return pair_of("qwen3")


@pytest.fixture
def make_engine(qwen3_pair: tuple[Path, Path]) -> MakeEngine:
    """`make_engine(**settings)`: a small fp32 engine of the qwen3 pair."""

    def make(**settings: Any) -> Engine:
        instruct, thinking = map(str, qwen3_pair)
        small = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "block_size": 4}
        return Engine(EngineConfig(instruct, thinking, **{**small, **settings}))

    return make
