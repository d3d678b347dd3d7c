"""Compiled decoder layers share code for each way, and compute what the model computes.

Layers are compiled with the kernels of a GPU, which Triton's interpreter runs here. Tests that only
count compilations replace the kernels by ones that return zeros.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.engine import Engine
from mi_runtime.execution.compiled_layers import compiled_logits
from mi_runtime.execution.decode_graphs import DecodeGraphs, Forward, GraphKey
from mi_runtime.kernels import paged_attention, pair_linear
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.row_lambdas import Way
from tests.runtime.execution.test_decode_graphs import RunAgain
from tests.runtime.execution.test_ways import make_subject
from tests.runtime.families import SLIDING

pytestmark = pytest.mark.usefixtures("few_programs")

PairOf = Callable[..., tuple[Path, Path]]
E, B, P = Way.ENDPOINT, Way.BLENDED, Way.PAIR


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def engine_of(directories: tuple[Path, Path]) -> Engine:
    engine = make_subject(directories, attention_backend="triton").engine
    engine._runner._model.kernels.enable(rows=64)
    engine._groups.cache = BlendCache(2)
    return engine


def graphs_of(engine: Engine, forward: Forward, blocks: int = 20) -> DecodeGraphs:
    model, own = engine._runner._model, engine._runner.attention
    attention = PagedAttention(
        *(model.layers, blocks, own.block_size, model.dtype, model.device, own.backend)
    )
    return DecodeGraphs(model, attention, RunAgain(), sizes=(2, 4), max_blocks=3, forward=forward)


def run(graphs: DecodeGraphs, keys: Sequence[GraphKey]) -> list[Tensor]:
    graphs.capture(keys)
    with torch.inference_mode():
        return [graphs._replays[key]().clone() for key in keys]


def zeros_backend(graph: GraphModule, _inputs: list[Tensor]) -> Callable[..., tuple[Tensor]]:
    """Compiles a layer to a function that returns zeros."""
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    hidden = names.index("l_inputs_0_")
    return lambda *inputs: (torch.zeros_like(inputs[hidden]),)


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the kernels by ones that return zeros, for tests that use no result."""
    monkeypatch.setattr(paged_attention, "_launch", lambda out, *others: out.zero_())
    monkeypatch.setattr(pair_linear, "_launch", lambda *inputs: inputs[3].zero_())


@pytest.mark.usefixtures("_no_kernels")
def test_all_layers_are_compiled_once_for_each_way(pair_of: PairOf) -> None:
    """The rows, the place of blended weights and the number of KV blocks do not matter."""
    engine = engine_of(pair_of("qwen3", num_hidden_layers=6))
    forward = compiled_logits(engine._runner._model, zeros_backend)
    trial, graphs = graphs_of(engine, forward, blocks=6), graphs_of(engine, forward)
    run(trial, trial.keys[:1])
    run(graphs, graphs.keys)
    assert len(graphs.keys) == 2 * 5
    assert counters["stats"]["unique_graphs"] == 4  # pair, two endpoints, blended


@pytest.mark.parametrize(
    ("family", "layers", "keys", "compiled"),
    [
        ("gpt_oss", 2, (GraphKey(4, P), GraphKey(2, P)), 2),  # layers with a window, and without
        pytest.param(
            *("qwen3", 2, (GraphKey(2, B, 0), GraphKey(2, B, 1), GraphKey(4, E, 1)), 2),
            marks=pytest.mark.long,
        ),
    ],
)
def test_compiled_layers_compute_what_the_model_computes(
    pair_of: PairOf, family: str, layers: int, keys: tuple[GraphKey, ...], compiled: int
) -> None:
    own = {"layer_types": SLIDING[:layers]} if family == "gpt_oss" else {}
    engine = engine_of(pair_of(family, num_hidden_layers=layers, **own))
    model = engine._runner._model
    model.groups.cache.places = sum(key.way is B for key in keys)
    plain = graphs_of(engine, model.logits)
    graphs = graphs_of(engine, compiled_logits(model, "eager"))
    for one in (plain, graphs):
        one._ids.copy_(torch.arange(4) * 7)
        one._positions.fill_(3)
        one._lambdas.copy_(torch.linspace(0, 1, 4).expand_as(one._lambdas))
    for one, expected in zip(run(graphs, keys), run(plain, keys), strict=True):
        assert expected.std() > 0.1
        assert (one - expected).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.usefixtures("_no_kernels")
def test_each_model_has_its_own_compile_limit(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mi_runtime.execution.compiled_layers.MAX_COMPILED", 1)
    for _ in range(2):
        engine = engine_of(pair_of("qwen3", num_hidden_layers=1))
        graphs = graphs_of(engine, compiled_logits(engine._runner._model, zeros_backend))
        run(graphs, graphs.keys[:1])
    assert counters["stats"]["unique_graphs"] == 2


def test_a_layer_that_cannot_be_compiled_runs_uncompiled_afterwards(pair_of: PairOf) -> None:
    def fails(graph: GraphModule, _inputs: list[Tensor]) -> Any:
        raise RuntimeError("no such instruction")

    engine = engine_of(pair_of("qwen3", num_hidden_layers=1))
    model = engine._runner._model
    plain = graphs_of(engine, model.logits)
    (expected,) = run(plain, plain.keys[-1:])
    graphs = graphs_of(engine, compiled_logits(model, fails))
    with pytest.raises(BackendCompilerFailed, match="no such instruction"):
        run(graphs, graphs.keys[:1])
    model.groups.end()
    assert torch.equal(run(plain, plain.keys[-1:])[0], expected)
