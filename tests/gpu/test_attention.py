"""Attention backends at the shapes of real models, against the reference in fp32, on the GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mi_runtime.attention.plan import LayerShape
from mi_runtime.attention.reference import ReferenceAttention
from mi_runtime.attention.selector import (
    AttentionWorkload,
    make_backend,
    measured_workloads,
    obstacle,
)
from tests.gpu.conftest import DEVICE, REHEARSED, on_a_gpu_only

pytestmark = pytest.mark.usefixtures("poisoned")

if REHEARSED:  # an interpreter computes a program at a time
    SHAPES = {
        "Qwen3-4B": LayerShape(2, 16, 16, heads=4),
        "sinks and a window": LayerShape(2, 16, 16, heads=4, window=16, sinks=True),
    }
    LOADS = {"32 of 1k": (4, 48), "2 of 16k": (2, 96)}
else:
    SHAPES = {
        "Qwen3-4B": LayerShape(8, 128, 128, heads=32),
        "Qwen3-30B-A3B": LayerShape(4, 128, 128, heads=32),
        "heads of 256 and a window": LayerShape(4, 256, 256, heads=16, window=1024),
        "sinks and a window": LayerShape(8, 64, 64, heads=64, window=128, sinks=True),
    }
    LOADS = {"32 of 1k": (32, 1024), "2 of 16k": (2, 16384)}  # decodes, tokens each
PREFILL = LOADS["32 of 1k"][1]
DTYPE = torch.float32 if REHEARSED else torch.bfloat16  # the interpreter treats bf16 as integers
NAMES = ("triton", "reference", "torch")
BLOCK_SIZE = 16
ERROR = 0.02  # of the largest output, in 16 bits


def workloads(shape: str, decodes: int, tokens: int, dtype: torch.dtype) -> list[AttentionWorkload]:
    """Returns a decode step, then a prefill chunk."""
    torch.manual_seed(0)
    device = torch.device(DEVICE)
    return list(measured_workloads([SHAPES[shape]], dtype, device, BLOCK_SIZE, decodes, tokens))


def exact(work: AttentionWorkload) -> Tensor:
    wide = ("query", "key", "value", "keys", "values")
    sinks = None if work.sinks is None else work.sinks.float()
    changed = {name: getattr(work, name).float() for name in wide}
    return replace(work, sinks=sinks, **changed).run(ReferenceAttention())


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert (out.float() - expected).abs().max() < ERROR * expected.abs().max()


def usable(name: str, shape: str, dtype: torch.dtype) -> str:
    reason = obstacle(name, [SHAPES[shape]], dtype, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    return name


def check_decodes(name: str, shape: str, load: str, dtype: torch.dtype) -> None:
    backend = make_backend(usable(name, shape, dtype))
    work, _ = workloads(shape, *LOADS[load], dtype)
    assert_near(work.run(backend), exact(work))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_agrees_with_the_reference(name: str, shape: str, load: str) -> None:
    check_decodes(name, shape, load, DTYPE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_prefill_chunk_after_a_prefix_agrees_with_the_reference(name: str, shape: str) -> None:
    backend = make_backend(usable(name, shape, DTYPE))
    _, work = workloads(shape, 2, PREFILL, DTYPE)
    assert_near(work.run(backend), exact(work))


@pytest.mark.parametrize("shape", SHAPES)
def test_kv_is_written_to_its_slots_and_nowhere_else(shape: str) -> None:
    backend = make_backend(usable("triton", shape, DTYPE))
    for work in workloads(shape, *LOADS["32 of 1k"], DTYPE):
        new = torch.randn_like(work.key), torch.randn_like(work.value)
        mine, expected = ((work.keys.clone(), work.values.clone()) for _ in range(2))
        backend.write(work.plan, *mine, *new)
        ReferenceAttention().write(work.plan, *expected, *new)
        assert all(map(torch.equal, mine, expected))


@on_a_gpu_only
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_decode_step_can_be_captured_and_reads_what_is_written_before_its_replay(
    name: str,
) -> None:
    backend = make_backend(usable(name, "Qwen3-4B", torch.bfloat16))
    work, _ = workloads("Qwen3-4B", 8, 1024, torch.bfloat16)
    work.run(backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work.run(backend)
    work.query.normal_()
    work.plan.lengths.sub_(5)  # other lengths, within the same bound
    graph.replay()
    assert_near(out, exact(work))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_decode_steps_of_other_dtypes_agree_with_the_reference(dtype: torch.dtype) -> None:
    check_decodes("triton", "Qwen3-4B", "32 of 1k", dtype)
