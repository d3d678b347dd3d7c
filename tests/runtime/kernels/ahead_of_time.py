"""Compiles Triton kernels for a GPU that is not there, and tells what they take of it.

    python -m tests.runtime.kernels.ahead_of_time 90        one JSON line a kernel

In a process of its own, without TRITON_INTERPRET, as tests have Triton interpret its kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mi_runtime.kernels import paged_attention
from mi_runtime.kernels.paged_attention import (
    add_parts_kernel,
    attend_kernel,
    attend_settings,
    write_kernel,
)

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def resources(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int
) -> dict[str, int]:
    """Shared memory in bytes, registers of a thread, bytes that it spills, and how many groups of
    loads may be in flight while it computes."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if (name in types and types[name] != "fp32") or re.search("(token|head)_stride$", name)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    usage = _resource_usage(compiled.asm["cubin"])
    waits = re.findall(r"wait_group\s+(\d+)", compiled.asm["ptx"])
    return {
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


def attention_resources(
    architecture: int,
    *,
    decode: bool,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    sinks: bool = False,
    split: bool = False,
) -> dict[str, int]:
    query = torch.empty(1, heads, dim, dtype=dtype)
    cache = torch.empty(1, 16, kv_heads, dim, dtype=dtype)
    settings = attend_settings(query, cache, cache, window, decode=decode)
    pointers = ("out", "query", "keys", "values", "sinks")
    types = dict.fromkeys(pointers, POINTERS[dtype]) | {"scale": "fp32"}
    types |= dict.fromkeys(("tables", "lengths", "query_starts"), "*i32")
    types |= dict.fromkeys(("partial", "partial_lse"), "*fp32")
    absent = [*([] if sinks else ["sinks"]), *([] if split else ["partial", "partial_lse"])]
    return resources(attend_kernel, types, settings | dict.fromkeys(absent, None), architecture)


def kernels(architecture: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Of the shapes that matter, and those that take most."""
    paged_attention.architecture = lambda _device: architecture
    run = attention_resources
    yield "decode", run(architecture, decode=True, split=True)
    yield "prefill", run(architecture, decode=False)
    yield "prefill in parts", run(architecture, decode=False, split=True)
    yield (
        "decode with window and sinks",
        run(architecture, decode=True, split=True, heads=64, dim=64, window=128, sinks=True),
    )
    yield "prefill of the largest heads", run(architecture, decode=False, dim=256, window=512)
    yield "decode of the largest heads", run(architecture, decode=True, dim=256, window=512)
    small = {"num_warps": 4, "num_stages": 3, "VALUE_DIM": 128, "VALUE_PAD": 128}
    parts = {"out": "*bf16", "partial": "*fp32", "partial_lse": "*fp32"}
    yield "adding parts", resources(add_parts_kernel, parts, {**small, "SPLITS": 64}, architecture)
    cache = dict.fromkeys(("keys", "values", "key", "value"), "*bf16") | {"slots": "*i64"}
    sizes = {"HEADS": 8, "HEADS_PAD": 8, "KEY_DIM": 128, "KEY_PAD": 128}
    yield "writing KV", resources(write_kernel, cache, {**small, **sizes}, architecture)


if __name__ == "__main__":
    for name, taken in kernels(int(sys.argv[1])):
        print(json.dumps({"kernel": name, **taken}), flush=True)
