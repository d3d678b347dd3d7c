"""Compiles what the kernels' modules launch, for a GPU that need not be there.

    python -m tests.runtime.kernels.ahead_of_time 90        one JSON line a launch

The modules' own host code runs, on tensors that are never read; in place of each launch Triton
compiles the kernel for the arguments it would have got. In a process of its own, without
TRITON_INTERPRET, as tests have Triton interpret its kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mi_runtime.kernels import paged_attention, pair_linear

KERNELS = {
    paged_attention: ("attend_kernel", "add_parts_kernel", "write_kernel"),
    pair_linear: ("_product", "_sum_splits"),
}


class Driver:
    """What Triton asks a GPU's driver for when it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Unlaunched:
    """Stands for a kernel: what it is launched with, it is compiled for."""

    def __init__(self, kernel: JITFunction, compiled: list[Any]) -> None:
        self._kernel, self._compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._compile, grid=grid)

    def _compile(self, *args: Any, **named: Any) -> None:
        self._compiled.append(self._kernel.warmup(*args, **named))


def resources(compiled: Any) -> dict[str, Any]:
    """Shared memory in bytes, registers of a thread, bytes that it spills, and how many groups of
    loads may be in flight while it computes."""
    usage = _resource_usage(compiled.asm["cubin"])
    waits = re.findall(r"wait_group\s+(\d+)", compiled.asm["ptx"])
    return {
        "kernel": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "in_flight": max(map(int, waits), default=0),
    }


def _resource_usage(binary: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- What is launched: the shapes that matter, and those that take most --------------------------


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def attention(
    *,
    decode: bool,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    window: int | None = None,
    sinks: bool = False,
    splits: int = 1,
) -> None:
    """Of a decode step of 64 sequences, or of a chunk of 64 tokens."""
    cache = empty(256, 16, kv_heads, dim)
    chunks, decodes = (64, 64) if decode else (1, 0)
    int32 = partial(torch.zeros, dtype=torch.int32)
    paged_attention.paged_attention(
        *(empty(64, heads, dim), cache, cache, int32(chunks, 16), int32(chunks)),
        *(int32(chunks + 1), empty(heads) if sinks else None, dim**-0.5, window),
        *(decodes, 256, 256, splits),
    )


def write_kv() -> None:
    cache, new = empty(256, 16, 8, 128), empty(64, 8, 128)
    paged_attention.write_kv(cache, cache, new, new, torch.arange(64))


def dense(rows: int, dtype: torch.dtype, columns: int = 2560, depth: int = 4096) -> None:
    x, weights = empty(rows, depth, dtype=dtype), torch.rand(rows)
    base = empty(columns, depth, dtype=dtype)
    both = empty(columns, 2, depth, dtype=dtype)
    pair_linear.pair_linear(x, both[:, 0], both[:, 1], weights)
    int8, scales = empty(columns, depth, dtype=torch.int8), torch.rand(columns, 1)
    pair_linear.delta_linear(x, base, int8, scales, weights[:1])
    int4 = empty(columns, depth // 2, dtype=torch.uint8)
    pair_linear.delta_linear(x, base, int4, empty(columns, depth // 64), weights)


def grouped(rows: int, experts: int = 8, columns: int = 1536, depth: int = 2048) -> None:
    expert_ids = torch.arange(rows * 2).view(rows, 2) % experts
    alignment = pair_linear.align(expert_ids, experts)
    x, weights = empty(rows, depth), torch.rand(rows)
    both = empty(experts, columns, 2, depth)
    first, second = both[:, :, 0], both[:, :, 1]
    linear = pair_linear.grouped_linear
    linear(x, first, second, None, empty(experts, 2, columns), weights, alignment, gather=True)
    linear(empty(2 * rows, depth), first, None, None, None, weights[:1], alignment, gather=False)
    swapped = empty(experts, 2, depth, columns)  # experts that are kept transposed
    linear(x, swapped[:, 0].mT, swapped[:, 1].mT, None, None, weights, alignment, gather=True)
    int4, scales = empty(experts, columns, depth // 2, dtype=torch.uint8), depth // 64
    linear(x, first, int4, empty(experts, columns, scales), None, weights, alignment, gather=True)


CASES = {
    "decode": partial(attention, decode=True, splits=64),
    "prefill": partial(attention, decode=False),
    "prefill in parts": partial(attention, decode=False, splits=4),
    "decode with window and sinks": partial(
        attention, decode=True, splits=4, heads=64, dim=64, window=128, sinks=True
    ),
    "prefill of the largest heads": partial(attention, decode=False, dim=256, window=512),
    "decode of the largest heads": partial(attention, decode=True, dim=256, window=512),
    "writing KV": write_kv,
    "products of a row": partial(dense, 1, torch.bfloat16),
    "products of many rows": partial(dense, 200, torch.bfloat16),
    "products in fp16": partial(dense, 40, torch.float16),
    "experts of a row": partial(grouped, 1),
    "experts of many rows": partial(grouped, 200),
}


def launches(capability: int) -> Iterator[dict[str, Any]]:
    """What each launch takes."""
    driver.set_active(Driver(capability))
    paged_attention.architecture = lambda _device: capability
    compiled: list[Any] = []
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Unlaunched(getattr(module, name), compiled))
    for case, launch in CASES.items():
        launch()
        yield from ({"case": case, **resources(one)} for one in compiled)
        compiled.clear()


if __name__ == "__main__":
    for launch in launches(int(sys.argv[1])):
        print(json.dumps(launch), flush=True)
