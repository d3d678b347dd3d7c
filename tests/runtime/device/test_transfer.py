"""A step copies little between host and device, and never waits for the device.

The tests run on torch's `meta` device, whose tensors have no values, so that waiting for a value
raises. Fake CUDA tensors cannot be sliced in a build of torch without CUDA.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi_runtime.device.transfer import Readback, on_device, send
from mi_runtime.execution import random_sampling
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


class CopyTrace(TorchDispatchMode):
    """Counts the copies between host and device, and fails for one that the host waits for."""

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
def copies_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[CopyTrace]:
    """Traces the test's body, without pinned memory, which needs a GPU."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    make = torch.tensor

    def on_the_host(*args: Any, device: torch.device | None = None, **kwargs: Any) -> Tensor:
        assert device is None, "a list that goes to the device is waited for"
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", on_the_host)
    with CopyTrace() as counting:
        yield counting


class FakeGrammar:
    """Stands for a grammar that allows the tokens below 5, and a think block."""

    def __init__(self, extra_token: int | None, may_open_block: bool) -> None:
        self.extra_token, self.may_open_block = extra_token, may_open_block
        self.constrains = True

    def mask(self) -> bytes:
        return b"\x1f"


def sequence(
    grammar: FakeGrammar | None = None,
    think: ThinkPolicy | None = None,
    dial: float = 0.5,
    **params: Any,
) -> Sequence:
    sampling = SamplingParams(**{"seed": 0, **params})
    made = Sequence(EngineRequest("r", (3, 3, 5), Dial(dial), sampling, think))
    made.append(9)
    made.grammar = grammar  # type: ignore[assignment]
    return made


def sequences_of_every_kind() -> list[Sequence]:
    """Returns one batch with every way in which a token is chosen."""
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
        sequence(FakeGrammar(None, False), temperature=0),
        sequence(FakeGrammar(OPEN, True)),
        sequence(FakeGrammar(CLOSE, False)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_does_not_wait_and_returns_its_results_in_one_copy(
    dtype: torch.dtype, copies_made: CopyTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_sampling, "GROUP", VOCAB // 3)  # as in a large vocabulary
    sequences = sequences_of_every_kind()
    assert sequences[6].forced_token == CLOSE
    logits = torch.randn(len(sequences), VOCAB, dtype=dtype, device=DEVICE)
    draw = Sampler().sample(logits, tuple(sequences))
    assert (draw.tokens.device.type, copies_made.fetched) == ("meta", 0)
    Readback(draw.tensors, logits.device)
    assert copies_made.fetched == 1


@pytest.mark.parametrize(
    ("params", "copies"), [({"temperature": 0}, 0), ({}, 1), ({"top_p": 0.9}, 1)], ids=str
)
def test_plain_steps_send_at_most_one_table(
    params: dict[str, Any], copies: int, copies_made: CopyTrace
) -> None:
    logits = torch.randn(3, VOCAB, device=DEVICE)
    Sampler().sample(logits, tuple(sequence(**params) for _ in range(3)))
    assert copies_made.sent == copies


def test_a_batch_and_its_rows_are_sent_in_one_copy_without_waiting(copies_made: CopyTrace) -> None:
    """The batch has prefills, decodes, and a decode whose token is not known yet, at two dials."""
    chunks = []
    for index, (start, length) in enumerate([(4, 1), (3, 1), (0, 4), (1, 3)]):
        one = sequence(dial=0.1 * (index // 2))
        one.block_table = [2 * index, 2 * index + 1]
        chunks.append(Chunk(one, start, length))
    drawn = {chunks[0].sequence: 2}
    batch = build_batch(SubBatch(chunks, blended=False), 4, 99, DEVICE, drawn)
    assert batch.placeholders is not None
    assert copies_made.sent == 1
    BlendGroups(2, DEVICE, BlendCache(0)).begin(batch.rows)
    assert copies_made.fetched == 0


def test_the_copy_trace_detects_every_host_sync(copies_made: CopyTrace) -> None:
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


def test_a_tensor_is_sent_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    there = on_device([1, 2], torch.int64, DEVICE)
    assert (len(pinned), there.device, there.dtype) == (1, DEVICE, torch.int64)


def test_on_a_cpu_a_tensor_is_not_copied() -> None:
    tensor = torch.zeros(3)
    assert send(tensor, CPU) is tensor


def test_a_readback_returns_the_same_values() -> None:
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
