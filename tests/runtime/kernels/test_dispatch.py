"""Models and engines compute the same by kernels, interpreted, as without them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_runtime.attention.reference import PackedAttention
from mi_runtime.config import DeltaDtype, EngineConfig
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.engine import Engine
from mi_runtime.kernels import pair_linear
from mi_runtime.kernels.dispatch import KernelDispatch
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import StepRows
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from tests.runtime.families import FAMILIES, VOCABULARY
from tests.runtime.shared_models import shared_model

pytestmark = pytest.mark.usefixtures("few_programs")

PairOf = Callable[..., tuple[Path, Path]]
Dials = tuple[Dial, ...]

LENGTHS = (9, 14)  # of two sequences in one forward
TOLERANCE = 1e-4  # max |Δlogit| in fp32
# Of matrices and experts: with biases, fused, shared experts beside the others, transposed.
OF_EACH_LAYOUT = ("llama", "phi3", "qwen2_moe", "qwen3_moe", "gpt_oss")
WITH_EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss")
MIXED, ALONE = (Dial(0.3), Dial(1.0)), (Dial(0.3),)
WAYS: tuple[tuple[Dials, bool], ...] = (  # pair, pair of one λ, blended, endpoint
    (MIXED, False),
    (ALONE, False),
    (ALONE, True),
    ((Dial(0.0),), False),
)


def few_layers(family: str) -> dict[str, Any]:
    """Returns changes that leave one layer of each kind, where a window is no kind of its own."""
    layers = 2 if family == "glm4_moe" else 1  # its first layer has no experts
    listed = {"layer_types", "no_rope_layers"} & FAMILIES[family].keys()
    cut = {key: FAMILIES[family][key][:layers] for key in listed}
    return {"num_hidden_layers": layers, **cut}


def logits(model: BlendedModel, dials: Dials, blended: bool = False) -> Tensor:
    """Returns the logits of two sequences, of which the second is at the last dial."""
    tokens = sum(LENGTHS)
    index = [0] * LENGTHS[0] + [len(dials) - 1] * LENGTHS[1]
    model.groups.begin(StepRows(dials, tuple(index), tuple(range(tokens)), blended))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ids = torch.arange(tokens) * 7 % VOCABULARY
    return model.logits(ids, positions, torch.arange(tokens), PackedAttention(LENGTHS))


@contextmanager
def by_kernel(kernels: KernelDispatch) -> Iterator[None]:
    """Turns the kernels on for as long as the context lasts."""
    kernels.enable(rows=1000)
    yield
    kernels.enable(rows=0, experts=False)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in OF_EACH_LAYOUT else pytest.mark.long)
        for family in FAMILIES
    ],
)
def test_a_family_computes_the_same_by_kernels(family: str, pair_of: PairOf) -> None:
    model = shared_model(pair_of(family, **few_layers(family)))
    for dials, blended in WAYS if family in WITH_EXPERTS else WAYS[:1]:
        expected = logits(model, dials, blended)
        with by_kernel(model.kernels):
            assert (logits(model, dials, blended) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("delta_dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_rounded_differences_compute_the_same_by_kernels(
    family: str, delta_dtype: DeltaDtype, pair_of: PairOf
) -> None:
    model = shared_model(pair_of(family, **few_layers(family)), delta_dtype=delta_dtype)
    expected = logits(model, MIXED)
    with by_kernel(model.kernels):
        assert (logits(model, MIXED) - expected).abs().max() < TOLERANCE


def test_experts_by_kernels_never_read_a_tensor_on_the_host(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model(pair_of("qwen3_moe", **few_layers("qwen3_moe")))

    def refuse(*_: object) -> None:
        raise AssertionError("the host looked at a tensor")

    with by_kernel(model.kernels):
        logits(model, MIXED)  # masks and positions are prepared
        monkeypatch.setattr(Tensor, "tolist", refuse)
        monkeypatch.setattr(Tensor, "item", refuse)
        logits(model, MIXED)


@pytest.mark.parametrize(("rows", "by_kernels"), [(22, False), (23, True)])
def test_products_of_more_rows_than_the_limit_use_no_kernel(
    rows: int, by_kernels: bool, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model(pair_of("llama", **few_layers("llama")))
    launched = []
    product = pair_linear.pair_linear

    def count(*args: Tensor) -> Tensor:
        launched.append(args)
        return product(*args)

    monkeypatch.setattr(pair_linear, "pair_linear", count)
    model.kernels.enable(rows=rows)
    logits(model, MIXED)
    a_layer = 4  # query, key and value; output; gate and up; down
    assert len(launched) == (1 + a_layer if by_kernels else 0)


def test_an_engine_gives_the_same_greedy_tokens_by_kernels() -> None:
    config = EngineConfig(
        str(INSTRUCT_DIRECTORY), str(THINKING_DIRECTORY), num_blocks=16, prefix_caching=False
    )
    engine = Engine(config)
    sampling = SamplingParams(max_tokens=3, temperature=0)
    requests = [
        EngineRequest(str(value), tuple(range(16, 24)), Dial(value), sampling)
        for value in (0.0, 0.4, 1.0)
    ]

    def tokens() -> dict[str, list[int | None]]:
        events = engine.generate(requests)
        return {name: [event.token_id for event in own] for name, own in events.items()}

    expected = tokens()
    engine._runner._model.kernels.enable(rows=1000)
    assert tokens() == expected
