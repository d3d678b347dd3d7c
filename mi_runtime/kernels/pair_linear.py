"""Products with both endpoints of a pair, as Triton kernels behind custom ops.

    pair      y = (1−λ) x W_Iᵀ + λ x W_Tᵀ     reads 2·N·K elements, whatever the number of λ
    single    y = x Wᵀ                        of experts whose rows share blended weights
    int8      y = x W_Iᵀ + λ s (x Qᵀ)         Q int8 `[N, K]`, s by output row

`x` `[M, K]`, matrices `[N, K]` (views with strides: the halves of a concatenated matrix, transposed
experts), λ `[M]` or `[1]` in fp32. Every product has an fp32 accumulator of its own; the two are
combined row by row in fp32 and rounded once. A row at λ = 0 or 1 is that endpoint's accumulator: an
infinity in the other never reaches it.

A decode step reads matrices and hardly computes: tiles are small in rows, and where a matrix has too
few rows to keep a GPU busy, its K is split, each split writes partial sums, and a second kernel adds
them in order. Nothing is added atomically, so a product gives the same bits every time. Tiles are
looked up in a table; nothing is tuned at run time.

Grouped by expert, one launch serves all experts of a projection: `align` sorts the rows by expert on
the device and cuts each expert's rows into blocks; their number is bounded by what the host knows,
and blocks beyond the real ones end at once. Nothing here waits for the device.

This module knows tensors; which products come here is decided in `choice.py`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
BUSY = 264  # programs that keep a GPU of 132 multiprocessors busy
MAX_SPLITS = 8
SINGLE, PAIR, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of product


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program computes at once, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {  # by the most rows they are meant for; all fit the shared memory of sm_80 and sm_90
    16: Tiles(16, 32, 128, warps=4, stages=4),
    32: Tiles(32, 32, 128, warps=4, stages=3),
    64: Tiles(64, 64, 64, warps=4, stages=4),
    128: Tiles(128, 64, 64, warps=8, stages=3),
}
FP32_DEPTH = 32


def tiles_for(rows: int, dtype: torch.dtype) -> Tiles:
    tiles = next((tiles for most, tiles in TILES.items() if rows <= most), TILES[128])
    if dtype == torch.float32:
        return Tiles(tiles.rows, tiles.columns, FP32_DEPTH, tiles.warps, stages=2)
    return tiles


def splits_for(programs: int, depth: int, tiles: Tiles) -> int:
    """Parts of K, each of some tiles at least, until there are enough programs."""
    return max(1, min(MAX_SPLITS, BUSY // programs, depth // (4 * tiles.depth)))


# --- Kernels ------------------------------------------------------------------------------------


@triton.jit
def _dot(left, right, sums, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if UPCAST:  # Triton's interpreter takes the bits of bf16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    else:
        right = right.to(left.dtype)  # whole numbers up to 256 are exact in bf16
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _between(low, high, value):  # type: ignore[no-untyped-def]
    """(1−λ) low + λ high, and exactly one of them at 0 and 1, whatever the other is."""
    mixed = (1 - value) * low + value * high
    return tl.where(value == 0, low, tl.where(value == 1, high, mixed))


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x,
    first,  # W, or W_I
    second,  # W_T, or Q
    scales,  # of Q
    biases,  # `[experts, 2, columns]`
    weights,
    out,
    order,  # assignments of a row to an expert, sorted by expert
    owners,  # the expert of each block
    begins,  # the first position in `order` of each block
    edges,  # the first position in `order` of each expert, and their end
    rows,
    columns,
    depth,
    split_depth,
    x_row,
    first_expert,
    first_row,
    first_column,
    second_expert,
    second_row,
    second_column,
    scales_expert,
    KIND: tl.constexpr,
    GROUPED: tl.constexpr,
    GATHER: tl.constexpr,  # x by token, out by position in `order`; else x by position
    TOP_K: tl.constexpr,
    WEIGHT_STEP: tl.constexpr,  # 0: all rows share one λ
    WHOLE: tl.constexpr,  # no tile reaches over the end of K or of a split
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    if GROUPED:
        begin = tl.load(begins + tl.program_id(0))
        if begin >= rows:  # fewer blocks than there could have been
            return
        expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
        position = begin + tl.arange(0, BLOCK_M)
        is_row = position < tl.load(edges + expert + 1)
        assignment = tl.load(order + position, mask=is_row, other=0)
        token = assignment // TOP_K
        if GATHER:
            x_index, out_index = token, position
        else:
            x_index, out_index = position, assignment
        first += expert * first_expert
    else:
        position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = position < rows
        token, x_index, out_index = position, position, position
        out_index += split * rows  # partial sums `[splits, rows, columns]`
    is_column = column < columns
    wide_column = column.to(tl.int64)  # a matrix may have more than 2³¹ elements
    k = split * split_depth + tl.arange(0, BLOCK_K)
    end = tl.minimum(depth, (split + 1) * split_depth)

    x_tile = x + x_index[:, None].to(tl.int64) * x_row + k[None, :]
    first_tile = first + wide_column[None, :] * first_row + k[:, None] * first_column
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if KIND != SINGLE:
        if GROUPED:
            second += expert * second_expert
        second_tile = second + wide_column[None, :] * second_row + k[:, None] * second_column
        high = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, end - split * split_depth, BLOCK_K):
        x_mask, w_mask = is_row[:, None], is_column[None, :]
        if not WHOLE:
            x_mask, w_mask = x_mask & (k < end)[None, :], w_mask & (k < end)[:, None]
        left = tl.load(x_tile, mask=x_mask, other=0)
        low = _dot(left, tl.load(first_tile, mask=w_mask, other=0), low, UPCAST)
        if KIND != SINGLE:
            right = tl.load(second_tile, mask=w_mask, other=0)
            high = _dot(left, right, high, UPCAST)
            second_tile += BLOCK_K * second_column
        x_tile += BLOCK_K
        first_tile += BLOCK_K * first_column
        k += BLOCK_K

    value = tl.load(weights + token * WEIGHT_STEP, mask=is_row, other=0)[:, None]
    if KIND == SINGLE:
        result = low
    elif KIND == PAIR:
        result = _between(low, high, value)
    else:
        if GROUPED:
            scales += expert * scales_expert
        scale = tl.load(scales + column, mask=is_column, other=0).to(tl.float32)
        result = tl.where(value == 0, low, low + value * (scale[None, :] * high))
    if biases is not None:
        bias = biases + expert * 2 * columns + column
        bias_low = tl.load(bias, mask=is_column, other=0).to(tl.float32)
        bias_high = tl.load(bias + columns, mask=is_column, other=0).to(tl.float32)
        result += _between(bias_low[None, :], bias_high[None, :], value)
    target = out + out_index[:, None].to(tl.int64) * columns + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(partial, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.load(partial + index, mask=mask, other=0)
    for split in range(1, SPLITS):
        total += tl.load(partial + split * size + index, mask=mask, other=0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)


# --- Dense products -----------------------------------------------------------------------------


def _dense(
    x: Tensor, first: Tensor, second: Tensor, scales: Tensor | None, weights: Tensor
) -> Tensor:
    (rows, depth), columns = x.shape, len(first)
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles = tiles_for(rows, x.dtype)
    out = x.new_empty(rows, columns)
    if not out.numel():
        return out
    grid = triton.cdiv(rows, tiles.rows), triton.cdiv(columns, tiles.columns)
    splits = splits_for(grid[0] * grid[1], depth, tiles)
    split_depth = triton.cdiv(triton.cdiv(depth, splits), tiles.depth) * tiles.depth
    splits = triton.cdiv(depth, split_depth)
    partial = out if splits == 1 else x.new_empty(splits, rows, columns, dtype=torch.float32)
    _product[(*grid, splits)](
        *(x, first, second, scales, None, weights, partial),
        *(None, None, None, None),
        *(rows, columns, depth, split_depth, x.stride(0)),
        *(0, *first.stride(), 0, *second.stride(), 0),
        KIND=PAIR if scales is None else INT8,
        GROUPED=False,
        GATHER=False,
        TOP_K=1,
        WEIGHT_STEP=int(len(weights) > 1),
        **_compiled_for(tiles, x, depth),
    )
    if splits > 1:
        block = 1024
        _sum_splits[(triton.cdiv(out.numel(), block),)](
            partial, out, out.numel(), SPLITS=splits, BLOCK=block
        )
    return out


def _compiled_for(tiles: Tiles, x: Tensor, depth: int) -> dict[str, int | bool]:
    return {
        "WHOLE": depth % tiles.depth == 0,
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.depth,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


@torch.library.custom_op("mi::pair_linear", mutates_args=())
def pair_linear(x: Tensor, instruct: Tensor, thinking: Tensor, weights: Tensor) -> Tensor:
    """`[M, K]` through both `[N, K]` matrices to `[M, N]`; `weights` `[M]` or `[1]` fp32 λ."""
    return _dense(x, instruct, thinking, None, weights)


@pair_linear.register_fake
def _(x: Tensor, instruct: Tensor, thinking: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], instruct.shape[0])


@torch.library.custom_op("mi::delta_linear", mutates_args=())
def delta_linear(x: Tensor, base: Tensor, delta: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    """`[M, K]` through `base` `[N, K]` and its quantized difference to `[M, N]`.

    `delta` int8 `[N, K]` with `scales` `[N, 1]`; `weights` `[M]` or `[1]` fp32 λ.
    """
    return _dense(x, base, delta, scales, weights)


@delta_linear.register_fake
def _(x: Tensor, base: Tensor, delta: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], base.shape[0])
