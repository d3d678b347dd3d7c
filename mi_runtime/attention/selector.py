"""Selects the attention backend that serves a model on a device.

On a CPU it is the reference. On a GPU, start-up measures every backend that supports the model, at
the model's own shapes for decode and prefill, and selects the fastest that agrees with the
reference. A setting can force one. Kernels are imported only when a backend needs them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mi_runtime.attention.plan import AttentionBackend, AttentionPlan, LayerShape, Prefill
from mi_runtime.attention.reference import ReferenceAttention
from mi_runtime.config import AttentionName
from mi_runtime.errors import PairError
from mi_runtime.kernels.triton_support import (
    cause_of,
    is_lost,
    launch_errors,
    triton_installed,
    triton_interpreted,
)

NAMES = ("reference", "triton", "torch")
LARGEST_HEAD = 256
# Start-up measures a decode step of DECODES sequences of TOKENS tokens, and a prefill chunk of
# TOKENS tokens after as many cached ones. The choice counts DECODES_A_PREFILL decode steps for each
# prefill chunk.
DECODES, TOKENS = 32, 1024
DECODES_A_PREFILL = 32
REPEATS = 5
# Largest error, as a share of the reference's largest output.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The selected backend."""

    backend: AttentionBackend
    description: str  # its name, and what was measured


def choose_attention(
    wanted: AttentionName,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
) -> AttentionChoice:
    """Selects the backend for these layers.

    `wanted` is `auto` or a name. Raises PairError if the wanted backend cannot serve these layers
    on this device, or if no backend can be measured.
    """
    if wanted != "auto":
        reason = obstacle(wanted, layers, dtype, device)
        if reason is not None:
            raise PairError([f"--attention-backend {wanted}: {reason}"])
        return AttentionChoice(make_backend(wanted), wanted)
    if device.type == "cpu":
        return AttentionChoice(ReferenceAttention(), ReferenceAttention.name)
    able = [name for name in NAMES if obstacle(name, layers, dtype, device) is None]
    workloads = tuple(measured_workloads(layers, dtype, device, block_size))
    choice = fastest([make_backend(name) for name in able], workloads, device_clock)
    del workloads
    torch.cuda.empty_cache()  # frees the memory of the measurement for KV
    return choice


def obstacle(
    name: str, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Returns why a backend cannot serve these layers on this device, or None."""
    if name == "reference":
        return None
    if not triton_installed():
        return "triton is not installed"
    if device.type != "cuda" and not (name == "triton" and triton_interpreted()):
        return "it requires a CUDA device"
    if any(max(layer.key_dim, layer.value_dim) > LARGEST_HEAD for layer in layers):
        return f"heads of more than {LARGEST_HEAD} are not supported"
    return None if name == "triton" else _obstacle_of_torch(layers, dtype)


def _obstacle_of_torch(layers: Sequence[LayerShape], dtype: torch.dtype) -> str | None:
    from mi_runtime.attention.torch_backend import torch_has_pages

    if not torch_has_pages():
        return f"torch {torch.__version__} has no attention over block tables (2.13 has)"
    if any(layer.sinks for layer in layers):
        return "the model has attention sinks"
    if any(layer.key_dim != layer.value_dim for layer in layers):
        return "heads of keys and values differ in size"
    return "it computes in 16 bits only" if dtype.itemsize != 2 else None


def make_backend(name: str) -> AttentionBackend:
    """Creates a backend by name. Importing it may fail where `obstacle` gives a reason."""
    if name == "reference":
        return ReferenceAttention()
    if name == "torch":
        from mi_runtime.attention.torch_backend import TorchAttention

        return TorchAttention()
    from mi_runtime.attention.triton_backend import TritonAttention

    return TritonAttention()


@dataclass(frozen=True, slots=True)
class AttentionWorkload:
    """Random queries over the random KV of one layer; `weight` is its share of the total time."""

    plan: AttentionPlan
    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    sinks: Tensor | None
    window: int | None
    weight: int

    def run(self, backend: AttentionBackend) -> Tensor:
        backend.write(self.plan, self.keys, self.values, self.key, self.value)
        return backend.attend(
            *(self.plan, self.query, self.keys, self.values),
            scale=self.query.shape[-1] ** -0.5,
            window=self.window,
            sinks=self.sinks,
        )


def measured_workloads(
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    decodes: int = DECODES,
    tokens: int = TOKENS,
) -> Iterator[AttentionWorkload]:
    """Yields a decode step and a prefill chunk for every distinct layer shape."""
    for shape, count in Counter(layers).items():
        blocks = decodes * -(-tokens // block_size)

        def random(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        keys = random(blocks + 1, block_size, shape.kv_heads, shape.key_dim)
        values = random(blocks + 1, block_size, shape.kv_heads, shape.value_dim)
        sinks = random(shape.heads) if shape.sinks else None
        for weight, sequences, length, rows in (
            (count * DECODES_A_PREFILL, decodes, tokens, 1),
            (count, 1, 2 * tokens, tokens),
        ):
            plan = uniform_plan(sequences, length, rows, block_size, blocks, device)
            query = random(sequences * rows, shape.heads, shape.key_dim)
            # equal to the cached ones, because workloads share the cache
            key, value = (cache.flatten(0, 1)[plan.slot_mapping] for cache in (keys, values))
            yield AttentionWorkload(
                plan, query, key, value, keys, values, sinks, shape.window, weight
            )


def uniform_plan(
    sequences: int, length: int, rows: int, block_size: int, blocks: int, device: torch.device
) -> AttentionPlan:
    """Plans sequences of one length whose last `rows` tokens are computed, in random blocks."""
    width = -(-length // block_size)
    tables = torch.randperm(blocks)[: sequences * width].view(sequences, width)
    positions = torch.arange(length - rows, length)
    slots = tables[:, positions // block_size] * block_size + positions % block_size
    decodes = sequences if rows == 1 else 0
    return AttentionPlan(
        slot_mapping=slots.flatten().to(device),
        query_starts=(torch.arange(sequences + 1) * rows).to(device, torch.int32),
        lengths=torch.full((sequences,), length, dtype=torch.int32, device=device),
        block_tables=tables.to(device, torch.int32),
        longest_decode=length if decodes else 0,
        longest_query=rows,
        longest=length,
        prefills=tuple(
            Prefill(one * rows, rows, length - rows) for one in range(decodes, sequences)
        ),
        partial_blocks=torch.empty(0, dtype=torch.int64, device=device),
    )


@torch.inference_mode()
def fastest(
    backends: Sequence[AttentionBackend], workloads: Sequence[AttentionWorkload], clock: Clock
) -> AttentionChoice:
    """Selects the fastest backend that runs and agrees with the first one, the reference.

    Raises PairError if the reference does not run, or if a failing backend makes the device
    unusable.
    """
    expected = _expected(backends[0], workloads)
    milliseconds: dict[AttentionBackend, float] = {}
    findings: dict[str, str] = {}
    for backend in backends:
        try:
            if not all(map(_agrees, (work.run(backend) for work in workloads), expected)):
                findings[backend.name] = "disabled: its output differs from the reference"
                continue
            milliseconds[backend] = sum(
                work.weight * clock(lambda: work.run(backend))  # noqa: B023
                for work in workloads
            )
        except torch.OutOfMemoryError:
            raise
        except launch_errors() as error:
            findings[backend.name] = f"failed ({cause_of(error)})"
            if is_lost(workloads[0].query.device):
                raise PairError([_lost_device(backend, findings[backend.name])]) from error
        else:
            findings[backend.name] = f"{milliseconds[backend]:.3g} ms"
    best = min(milliseconds, key=milliseconds.__getitem__)
    others = ", ".join(f"{name} {finding}" for name, finding in findings.items())
    workload = f"{DECODES_A_PREFILL} decode steps and a prefill chunk"
    return AttentionChoice(best, f"{best.name} ({workload}: {others})")


def _expected(reference: AttentionBackend, workloads: Sequence[AttentionWorkload]) -> list[Tensor]:
    try:
        return [work.run(reference) for work in workloads]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PairError(
            [
                "the attention backends cannot be compared because the reference backend failed "
                f"({cause_of(error)}); choose one with --attention-backend"
            ]
        ) from error


def _agrees(out: Tensor, expected: Tensor) -> bool:
    error = (out.float() - expected.float()).abs().max()
    return bool(error <= TOLERANCE[expected.dtype] * expected.float().abs().max())


def _lost_device(backend: AttentionBackend, finding: str) -> str:
    return (
        f"the attention backend {backend.name} {finding}, and this process can no longer use the "
        "GPU; start again with another --attention-backend"
    )


def device_clock(work: Callable[[], object]) -> float:
    """Returns the milliseconds of device time, the least of a few repeats.

    All repeats are launched before the first one ends, so that the host's launches do not count, as
    they do not in a CUDA graph.
    """
    work()
    marks: list[Any] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(REPEATS + 1)
    ]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # cycles, about 30 ms
    for mark in marks[:-1]:
        mark.record()
        work()
    marks[-1].record()
    torch.cuda.synchronize()
    return min(float(start.elapsed_time(end)) for start, end in pairwise(marks))
