"""What crosses between host and device, traced with a device whose tensors have no values.

It is torch's `meta`: what would wait for a value raises. Fake CUDA tensors can do the same, but not
be sliced where torch was built without CUDA.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi_runtime.device.transfer import Readback, on_device, send
from mi_runtime.execution import topk_topp
from mi_runtime.execution.batch import build_batch
from mi_runtime.execution.sampler import Sampler
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.row_lambdas import BlendGroups
from mi_runtime.request import Dial, EngineRequest, SamplingParams, ThinkPolicy
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch
from mi_runtime.scheduling.sequence import Sequence

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
VOCAB = 40
OPEN, CLOSE = 7, 8


class Crossings(TorchDispatchMode):
    """Counts the copies between host and device; refuses those that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.fetched = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [
            one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()
        ]
        devices = {one.device for one in given}
        assert len(devices) <= 1, f"{func} takes tensors of the host and of the device"
        assert func is not torch.ops.aten.index.Tensor, "brackets: an index of the host, or a mask"
        if func is not torch.ops.aten._to_copy.default or {kwargs.get("device")} <= {
            *devices,
            None,
        }:
            return func(*args, **kwargs)
        assert kwargs.get("non_blocking"), "a copy that is waited for"
        if kwargs["device"] == DEVICE:
            self.sent += 1
            return func(*args, **kwargs)
        self.fetched += 1
        return torch.zeros(args[0].shape, dtype=args[0].dtype)


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crossings]:
    """Watches the test's body; pinned memory needs a GPU."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    make = torch.tensor

    def on_the_host(*args: Any, device: torch.device | None = None, **kwargs: Any) -> Tensor:
        assert device is None, "a list that goes to the device is waited for"
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", on_the_host)
    with Crossings() as counting:
        yield counting


class Grammar:
    """In the place of a grammar: allows the tokens below 5, and a think block."""

    def __init__(self, extra_token: int | None, may_open_block: bool) -> None:
        self.extra_token, self.may_open_block = extra_token, may_open_block
        self.constrains = True

    def mask(self) -> bytes:
        return b"\x1f"


def sequence(
    grammar: Grammar | None = None,
    think: ThinkPolicy | None = None,
    dial: float = 0.5,
    **params: Any,
) -> Sequence:
    sampling = SamplingParams(**{"seed": 0, **params})
    made = Sequence(EngineRequest("r", (3, 3, 5), Dial(dial), sampling, think))
    made.append(9)
    made.grammar = grammar  # type: ignore[assignment]
    return made


def everything() -> list[Sequence]:
    """Every way a token is chosen, in one batch."""
    ends = frozenset({1, 2})
    capped = ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=1)
    return [
        sequence(temperature=0),
        sequence(),
        sequence(top_k=4, top_p=0.9, min_p=0.01, logprobs=2),
        sequence(top_p=0.9),
        sequence(repetition_penalty=1.2, presence_penalty=0.5, logit_bias=((4, 1.0),)),
        sequence(temperature=0, min_tokens=9, eos_token_ids=ends, logprobs=0),
        sequence(think=capped, logprobs=2),
        sequence(Grammar(None, False), temperature=0),
        sequence(Grammar(OPEN, True)),
        sequence(Grammar(CLOSE, False)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_waits_for_nothing_and_its_results_are_one_copy(
    dtype: torch.dtype, crossings: Crossings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk_topp, "GROUP", VOCAB // 3)  # as in a large vocabulary
    sequences = everything()
    assert sequences[6].forced_token == CLOSE
    logits = torch.randn(len(sequences), VOCAB, dtype=dtype, device=DEVICE)
    draw = Sampler().sample(logits, tuple(sequences))
    assert (draw.tokens.device.type, crossings.fetched) == ("meta", 0)
    Readback(draw.tensors, logits.device)
    assert crossings.fetched == 1


@pytest.mark.parametrize(
    ("params", "copies"), [({"temperature": 0}, 0), ({}, 1), ({"top_p": 0.9}, 1)], ids=str
)
def test_plain_steps_send_one_table_at_most(
    params: dict[str, Any], copies: int, crossings: Crossings
) -> None:
    logits = torch.randn(3, VOCAB, device=DEVICE)
    Sampler().sample(logits, tuple(sequence(**params) for _ in range(3)))
    assert crossings.sent == copies


def test_a_batch_and_its_rows_are_sent_without_waiting(crossings: Crossings) -> None:
    """Prefills, decodes, and decodes whose token is still being drawn, of two dials."""
    chunks = []
    for index, (start, length) in enumerate([(4, 1), (3, 1), (0, 4), (1, 3)]):
        one = sequence(dial=0.1 * (index // 2))
        one.block_table = [2 * index, 2 * index + 1]
        chunks.append(Chunk(one, start, length))
    drawn = {chunks[0].sequence: 2}
    batch = build_batch(SubBatch(chunks, blended=False), 4, 99, DEVICE, drawn)
    assert batch.placeholders is not None
    assert crossings.sent == 1
    BlendGroups(2, DEVICE, BlendCache(0)).begin(batch.rows)
    assert crossings.fetched == 0


def test_the_trace_would_tell(crossings: Crossings) -> None:
    logits = torch.randn(3, VOCAB, device=DEVICE)
    for waits in (
        lambda: logits.isfinite().all().item(),
        lambda: bool(logits.isfinite().all()),
        lambda: logits.argmax(1).tolist(),
        lambda: logits.cpu(),
        lambda: torch.tensor([1, 2]).to(DEVICE),
        lambda: torch.tensor([1, 2], device=DEVICE),
        lambda: logits[[0, 1]],
        lambda: logits[logits > 0],
    ):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            waits()


def test_what_is_sent_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    there = on_device([1, 2], torch.int64, DEVICE)
    assert (len(pinned), there.device, there.dtype) == (1, DEVICE, torch.int64)


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(3)
    assert send(tensor, CPU) is tensor


def test_what_comes_back_is_what_was_sent_to_the_host() -> None:
    tensors = [
        torch.tensor([[1.5, -2.25], [0.0, torch.nan]]),
        torch.tensor([3, -1, 2**31 - 1], dtype=torch.int32),
        torch.empty(2, 0),
        torch.arange(6, dtype=torch.int32).view(2, 3).T,
    ]
    for tensor, there in zip(tensors, Readback(tensors, CPU).wait(), strict=True):
        assert torch.equal(there.nan_to_num(7.0), tensor.nan_to_num(7.0))
        assert there.dtype == tensor.dtype
    assert list(Readback([], CPU).wait()) == []
