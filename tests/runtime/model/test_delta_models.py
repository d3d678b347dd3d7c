"""Models of every family whose Thinking endpoint is stored as a rounded delta D̂.

There are two oracles, both plain `transformers`. The served model must equal a checkpoint with
W_I + λ·D̂ up to fp32 rounding, and lie near the one that is merged from both endpoints.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from mi_runtime.attention.reference import PackedAttention
from mi_runtime.config import DeltaDtype
from mi_runtime.errors import PairError
from mi_runtime.model import delta, load
from mi_runtime.model.delta import DeltaKind, quantize
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import Checkpoint, check_pair
from mi_runtime.model.row_lambdas import StepRows, Way
from mi_runtime.model.swap import _take
from mi_runtime.request import Dial
from tests.runtime import oracle
from tests.runtime.execution.test_ways import (
    TOLERANCE,
    Directories,
    PairOf,
    Subject,
    make_subject,
    random_tokens,
)
from tests.runtime.families import FAMILIES, marks_of
from tests.runtime.ways import RandomPlanner

APART = 0.1  # as far as endpoints of real pairs lie from each other


@cache
def rounded(directories: Directories, value: float, kind: DeltaKind) -> Any:
    """Returns a plain model with W_I + λ·D̂ in all matrices but routers, and the rest merged."""
    model = deepcopy(oracle.merged(*directories, value))
    low, high = (dict(oracle.endpoint(one).named_parameters()) for one in directories)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if is_compact(module, name, parameter):
            transposed = getattr(module, "is_transposed", False)
            parameter.copy_(with_delta((low[name], high[name]), value, kind, transposed))
    return model


def is_compact(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Returns whether a parameter is stored as a rounded delta."""
    is_router = type(module).__name__.endswith("Router")
    return parameter.dim() > 1 and not name.endswith("bias") and not is_router


def with_delta(
    pair: tuple[Tensor, Tensor], value: float, kind: DeltaKind, transposed: bool
) -> Tensor:
    instruct, thinking = (one.mT if transposed else one for one in pair)
    kept = quantize(instruct.contiguous(), thinking.contiguous(), kind).dequantized(torch.float32)
    out = instruct + value * kept
    return out.mT if transposed else out


@dataclass
class DeltaSubject(Subject):
    kind: DeltaKind = "int8"

    def oracle(self, value: float) -> Any:
        return rounded(self.directories, value, self.kind)

    def logits_of(self, sequences: list[list[int]], value: float) -> Tensor:
        """Returns the logits of sequences in one pair forward at λ, `[tokens, vocabulary]`."""
        model, lengths = self.engine._runner._model, tuple(map(len, sequences))
        total = sum(lengths)
        model.groups.begin(StepRows((Dial(value),), (0,) * total, tuple(range(total)), False))
        ids = torch.tensor([token for tokens in sequences for token in tokens])
        positions = torch.cat([torch.arange(length) for length in lengths])
        return model.logits(ids, positions, torch.arange(total), PackedAttention(lengths))


def delta_subject(directories: Directories, kind: DeltaKind, **settings: Any) -> DeltaSubject:
    engine = make_subject(directories, delta_dtype=kind, **settings).engine
    return DeltaSubject(directories, engine, kind)


IN_INT4 = ("qwen3", "gemma3_text", "starcoder2", "mixtral", "gpt_oss")


@pytest.fixture(
    params=[
        pytest.param((family, kind), id=f"{family} {kind}", marks=marks_of(family))
        for kind, families in (("int8", FAMILIES), ("int4", IN_INT4))
        for family in families
    ]
)
def subject(request: pytest.FixtureRequest, pair_of: PairOf) -> DeltaSubject:
    family, kind = request.param
    return delta_subject(pair_of(family, apart=APART), kind)


def test_every_way_computes_with_instruct_plus_λ_times_the_rounded_delta(
    subject: DeltaSubject,
) -> None:
    """All rows are at λ, by each way, and then half of them are."""
    for value in (0.0, 0.11, 1.0):
        dial, expected = Dial(value), subject.expected((value, value))
        before = subject.executions()
        ways = [
            subject.logits((dial, dial), blended=True),
            subject.logits((dial, dial), blended=False),
            [subject.logits((dial, Dial(0.37)), blended=False)[0]],
        ]
        taken = {way for way, count in subject.executions().items() if count > before[way]}
        assert taken == ({Way.BLENDED, Way.PAIR} if value else {Way.ENDPOINT, Way.PAIR})
        for logits in ways:
            for own, wanted in zip(logits, expected, strict=False):
                assert (own - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_greedy_tokens_stay_the_same_when_ways_switch_at_random(
    pair_of: PairOf, family: str
) -> None:
    """The run mixes decodes, chunked prefills and cached prefixes at all λ, 0 and 1 included."""
    subject = delta_subject(pair_of(family, apart=APART), "int8")
    before = subject.executions()
    subject.engine._runner.planner = RandomPlanner(0)  # type: ignore[assignment]
    subject.check_answers()
    subject.check_answers()
    assert all(count > before[way] for way, count in subject.executions().items())


def test_with_a_delta_λ_1_is_blended_like_any_other_λ(pair_of: PairOf) -> None:
    """With the policy `blended`, λ = 1 has blended weights, which are built and found again."""
    subject = delta_subject(pair_of("qwen3", apart=APART), "int8", blend_policy="blended")
    subject.check_answers()
    groups = subject.engine._groups
    assert groups.cache.missing((name, 1.0) for name in groups.names) == 0
    assert subject.engine.stats().endpoint_executions > 0  # λ = 0


# --- What the rounding costs ----------------------------------------------------------------------

LONG_SEQUENCES = [random_tokens(60, seed) for seed in range(4)]
ERROR = {"int8": 0.012, "int4": 0.2}  # measured at λ = 1: 0.006 to 0.010, and 0.12 to 0.17
AGREEMENT = {"int8": 0.96, "int4": 0.8}  # measured: at least 0.969 and 0.835, both mixtral


def test_logits_and_greedy_tokens_lie_near_those_of_the_exact_pair(subject: DeltaSubject) -> None:
    """A row's error is measured in the distance between the endpoints' logits.

    The error of int8 is about what one step of λ, 0.01, changes. It is the median over all rows,
    because in a few a router chooses another expert. Random models are unsure of every token, so
    that their tokens differ sooner than those of trained ones.
    """
    apart = exact_logits(subject.directories, 1.0) - exact_logits(subject.directories, 0.0)
    agreement = []
    for value in (0.5, 1.0):
        exact, served = (
            exact_logits(subject.directories, value),
            subject.logits_of(LONG_SEQUENCES, value),
        )
        error = ((served - exact).norm(dim=1) / apart.norm(dim=1)).median()
        assert error < ERROR[subject.kind] * value
        agreement.append((served.argmax(1) == exact.argmax(1)).float().mean())
    assert sum(agreement) / 2 > AGREEMENT[subject.kind]


@cache
def exact_logits(directories: Directories, value: float) -> Tensor:
    model = oracle.merged(*directories, value)
    return torch.cat([oracle.logits(model, tokens) for tokens in LONG_SEQUENCES])


# --- Loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta_dtype", "expected"), [("none", ["cuda", "cuda"]), ("int8", ["cuda", "cpu"])]
)
def test_with_a_rounded_delta_thinking_is_not_loaded_to_the_gpu(
    pair_of: PairOf,
    delta_dtype: DeltaDtype,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[str] = []

    def load_endpoint(endpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
        devices.append(device.type)
        if len(devices) == 2:
            raise PairError(["seen enough"])
        return nn.Module()

    monkeypatch.setattr(load, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(load, "_load_checkpoint", load_endpoint)
    with pytest.raises(PairError, match="seen enough"):
        load_pair(check_pair(*pair_of("qwen3")), "cuda", "bfloat16", delta_dtype)
    assert devices == expected


def test_a_tensor_is_moved_to_the_device_of_its_counterpart() -> None:
    here, there = nn.Linear(3, 2, device="meta"), nn.Linear(3, 2)
    taken = _take(here, there, "weight")
    assert taken is not None
    assert [tensor.device.type for tensor in taken] == ["meta", "meta"]
    assert "weight" not in there._parameters


# --- The self-check -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(DeltaKind))
@pytest.mark.parametrize("wrong", ["missing", "negated"])
def test_a_missing_or_negated_delta_fails_the_self_check(
    pair_of: PairOf, kind: DeltaKind, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = delta.quantize
    quantize_wrongly = {
        "missing": lambda instruct, _, kind: right(instruct, instruct, kind),
        "negated": lambda instruct, thinking, kind: right(thinking, instruct, kind),
    }
    monkeypatch.setattr(delta, "quantize", quantize_wrongly[wrong])
    with pytest.raises(PairError, match="self-check failed: blended logits at λ = 1"):
        load_pair(check_pair(*pair_of("qwen3", apart=APART)), "cpu", "float32", kind)
