"""Compiles what `mi_runtime.kernels.pair_linear` launches, for a GPU that need not be there.

The module's own host code runs on tensors that are never read; in place of each launch the kernel
is compiled for the arguments it would have got. Prints one JSON line a launch. Triton must not be
interpreted: run it in a process of its own.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mi_runtime.kernels import pair_linear

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


class AheadOfTime:
    """Stands for a kernel: launching it compiles it as Triton would for these arguments."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self._kernel, self._target = kernel, GPUTarget("cuda", capability, 32)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        names = self._kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **named}
        constant = {one.name for one in self._kernel.params if one.is_constexpr}
        plain = {one.name for one in self._kernel.params if one.do_not_specialize}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = values[name]
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            elif name in constant or value is None or (value == 1 and name not in plain):
                signature[name], constants[(index,)] = "constexpr", value
                continue
            else:
                signature[name] = "i32"
            if isinstance(value, Tensor) or (value % 16 == 0 and name not in plain):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constants, attributes)
        binary = compile(source, target=self._target, options=options)
        print(json.dumps([self._kernel.__name__, binary.metadata.shared, len(binary.asm["cubin"])]))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


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


def main(capability: int) -> None:
    for name in ("_product", "_sum_splits"):
        setattr(pair_linear, name, AheadOfTime(getattr(pair_linear, name), capability))
    for rows in (1, 200):
        dense(rows, torch.bfloat16)
        grouped(rows)
    dense(40, torch.float16)


if __name__ == "__main__":
    main(int(sys.argv[1]))
