"""The smallest Triton kernel that shows whether kernels compile, launch and write."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def _double(source, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    tl.store(out + index, 2 * tl.load(source + index, mask=mask), mask=mask)


def doubled(numbers: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(numbers, torch.nan)
    _double[triton.cdiv(numbers.numel(), BLOCK),](numbers, out, numbers.numel(), BLOCK=BLOCK)
    return out
