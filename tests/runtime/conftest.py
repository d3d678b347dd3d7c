"""Fixtures of pairs on disk, each built once a session, and of engines over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.execution import startup
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.scheduling.planner import CostModel
from tests.runtime import oracle, shared_models
from tests.runtime.families import write_pair

PairOf = Callable[..., tuple[Path, Path]]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _costs_are_measured_once_a_model() -> Iterator[None]:
    """Measures costs once a model: it takes longer than most tests run an engine."""
    measure, measured = startup.measure_costs, dict[object, CostModel]()

    def measure_once(model: BlendedModel) -> CostModel:
        if model.model not in measured:
            measured[model.model] = measure(model)
        return measured[model.model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "measure_costs", measure_once)
        yield


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PairOf]:
    """Writes random pairs once each: `pair_of(family, **changes)` returns the two directories."""

    pairs: dict[str, tuple[Path, Path]] = {}

    def pair(family: str, **changes: Any) -> tuple[Path, Path]:
        name = f"{family} {changes}"
        if name not in pairs:
            pairs[name] = write_pair(tmp_path_factory.mktemp(family), family, **changes)
        return pairs[name]

    yield pair
    oracle.forget_all()
    shared_models.forget_all()


@pytest.fixture(scope="session")
def qwen3_pair(pair_of: PairOf) -> tuple[Path, Path]:
    return pair_of("qwen3")


@pytest.fixture
def make_engine(qwen3_pair: tuple[Path, Path]) -> MakeEngine:
    """Makes small fp32 engines on the shared model of the qwen3 pair: `make_engine(**settings)`."""

    def make(**settings: Any) -> Engine:
        instruct, thinking = map(str, qwen3_pair)
        small = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "block_size": 4}
        return shared_models.engine_of(EngineConfig(instruct, thinking, **{**small, **settings}))

    return make


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets large tiles: Triton's interpreter takes its time by program, not by number."""
    from mi_runtime.kernels import pair_linear

    monkeypatch.setattr(pair_linear, "TILES", {128: pair_linear.Tiles(32, 512, 512, 1, 1)})
    monkeypatch.setattr(pair_linear, "OF_FP32", {})
    monkeypatch.setattr(pair_linear, "BUSY", 1)
