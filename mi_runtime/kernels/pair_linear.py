"""Triton kernels, registered as custom ops, for products with both endpoints of a pair.

    pair      y = (1−λ) x W_Iᵀ + λ x W_Tᵀ     reads 2·N·K elements, whatever the number of λ
    single    y = x Wᵀ                        for experts whose rows share one matrix
    int8      y = x W_Iᵀ + λ s (x Qᵀ)         Q int8 `[N, K]`, s per output row
    int4      y = x W_Iᵀ + λ Σ s_g (x_g Q_gᵀ)  s per output row and group of inputs, Q two per byte

`mi_runtime/model/delta.py` defines the layout of deltas. `x` is `[M, K]`, matrices are `[N, K]`
(possibly views: halves of a concatenated matrix, transposed experts), and λ is `[M]` or `[1]` in
fp32. Both products have their own fp32 accumulator; the two are combined row by row in fp32 and
rounded once. A row at λ = 0 or 1 takes only that endpoint's accumulator, so that an infinity in the
other one never reaches it.

A decode step is bound by reading the matrices, so tiles have few rows. If a matrix has too few rows
to keep a GPU busy, its K is split: each split writes partial sums, and a second kernel adds them in
order. Nothing is added atomically, so a product always gives the same bits. Tile sizes come from a
table; nothing is tuned at run time.

For experts, one launch computes all experts of a projection. `align` sorts the rows by expert on
the device and divides each expert's rows into blocks. The host knows an upper bound of the number
of blocks, and the programs of unused blocks return at once. Nothing here waits for the device.

`dispatch.py` decides which products use these kernels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mi_runtime.kernels.triton_support import triton_interpreted

INTERPRETED = triton_interpreted()
SUM_BLOCK = 1024
BUSY = 264  # programs that keep a GPU of 132 multiprocessors busy
MAX_SPLITS = 8
SINGLE, PAIR, INT8, INT4 = map(tl.constexpr, range(4))  # the kinds of product above
KINDS = {torch.int8: 2, torch.uint8: 3}  # by the dtype of the second matrix


@dataclass(frozen=True, slots=True)
class Tiles:
    """How much one program computes at once, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {  # by the most rows they are for; all fit in the shared memory of sm_80 and sm_90
    16: Tiles(16, 32, 128, warps=4, stages=4),
    32: Tiles(32, 32, 64, warps=4, stages=4),
    64: Tiles(64, 64, 64, warps=4, stages=4),
    128: Tiles(128, 64, 64, warps=8, stages=3),
}
# Tensor cores would round fp32, so it is multiplied without them, which needs more registers. The
# interpreter has no such limit, and is slow with many programs.
OF_FP32 = {"depth": 32} | ({} if INTERPRETED else {"columns": 16, "warps": 8, "stages": 2})


def tiles_for(rows: int, dtype: torch.dtype, group: int | None = None) -> Tiles:
    """Returns the tiles for `rows`. With int4, a tile is as deep as one `group` of inputs."""
    tiles = next((tiles for most, tiles in TILES.items() if rows <= most), TILES[128])
    if dtype == torch.float32:
        tiles = replace(tiles, **OF_FP32)
    elif group is not None:
        tiles = replace(tiles, columns=64)
    return tiles if group is None else replace(tiles, depth=group)


def splits_for(programs: int, depth: int, tiles: Tiles) -> int:
    """Returns into how many splits to divide K, each at least four tiles deep."""
    return max(1, min(MAX_SPLITS, BUSY // programs, depth // (4 * tiles.depth)))


# --- Kernels ------------------------------------------------------------------------------------


@triton.jit
def _dot(left, right, sums, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter treats the bits of bf16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    else:
        right = right.to(left.dtype)  # integers up to 256 are exact in bf16
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _between(low, high, value):
    """Returns (1−λ) low + λ high; at 0 and 1 exactly one of them, whatever the other is."""
    mixed = (1 - value) * low + value * high
    return tl.where(value == 0, low, tl.where(value == 1, high, mixed))


# Neither the size of a batch nor the alignment of its λ causes another compilation.
@triton.jit(
    do_not_specialize=["rows", "lambda_step", "scales_expert", "scales_row"],
    do_not_specialize_on_alignment=["scales", "lambdas", "order", "owners", "begins", "edges"],
)
def _product(
    x,
    first,  # W, or W_I
    second,  # W_T, or Q
    scales,
    biases,  # `[experts, 2, columns]`
    lambdas,
    out,
    order,  # assignments of rows to experts, sorted by expert
    owners,  # the expert of each block
    begins,  # the first position in `order` of each block
    edges,  # the first position in `order` of each expert, and their end
    rows,
    columns,
    depth,
    split_depth,
    lambda_step,  # 0: all rows share one λ
    x_row,
    first_expert,
    first_row,
    first_column,
    second_expert,
    second_row,
    second_column,
    scales_expert,
    scales_row,
    scales_column,
    KIND: tl.constexpr,
    GROUPED: tl.constexpr,
    GATHER: tl.constexpr,  # x is indexed by token, out by position in `order`; else x by position
    TOP_K: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile extends beyond the end of K or of a split
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    if GROUPED:
        begin = tl.load(begins + tl.program_id(0))
        if begin >= rows:  # an unused block
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
        if KIND != SINGLE:
            second += expert * second_expert
        if scales is not None:
            scales += expert * scales_expert
    else:
        position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = position < rows
        token, x_index, out_index = position, position, position + split * rows
    is_column = column < columns
    wide_column = column.to(tl.int64)  # a matrix may have more than 2³¹ elements
    x += x_index[:, None].to(tl.int64) * x_row
    first += wide_column[None, :] * first_row
    if KIND != SINGLE:
        second += wide_column[None, :] * second_row
    if scales is not None:
        group_scales = scales + wide_column * scales_row
    begin_k = split * split_depth
    end_k = tl.minimum(depth, begin_k + split_depth)

    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    high = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin_k, end_k, BLOCK_K):
        if KIND == INT4:
            HALF: tl.constexpr = BLOCK_K // 2
            k = start + tl.arange(0, HALF)
            x_mask, w_mask = is_row[:, None], is_column[None, :]
            left_mask, right_mask = x_mask, x_mask
            low_mask, high_mask = w_mask, w_mask
            if not WHOLE:
                left_mask = x_mask & (k < depth)[None, :]
                right_mask = x_mask & (k + HALF < depth)[None, :]
                low_mask = w_mask & (k < depth)[:, None]
                high_mask = w_mask & (k + HALF < depth)[:, None]
            left = tl.load(x + k[None, :], mask=left_mask, other=0)
            right = tl.load(x + k[None, :] + HALF, mask=right_mask, other=0)
            tile = first + k[:, None] * first_column
            low = _dot(left, tl.load(tile, mask=low_mask, other=0), low, UPCAST)
            tile += HALF * first_column
            low = _dot(right, tl.load(tile, mask=high_mask, other=0), low, UPCAST)
            byte = start // 2 + tl.arange(0, HALF)
            packed = tl.load(second + byte[:, None] * second_column, mask=w_mask, other=0)
            steps = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            steps = _dot(left, (packed & 15).to(tl.int8) - 8, steps, UPCAST)
            steps = _dot(right, (packed >> 4).to(tl.int8) - 8, steps, UPCAST)
            scale = tl.load(group_scales + start // BLOCK_K * scales_column, mask=is_column)
            high += steps * scale.to(tl.float32)[None, :]
        else:
            k = start + tl.arange(0, BLOCK_K)
            x_mask, w_mask = is_row[:, None], is_column[None, :]
            if not WHOLE:
                x_mask, w_mask = x_mask & (k < depth)[None, :], w_mask & (k < depth)[:, None]
            left = tl.load(x + k[None, :], mask=x_mask, other=0)
            tile = tl.load(first + k[:, None] * first_column, mask=w_mask, other=0)
            low = _dot(left, tile, low, UPCAST)
            if KIND != SINGLE:
                tile = tl.load(second + k[:, None] * second_column, mask=w_mask, other=0)
                high = _dot(left, tile, high, UPCAST)

    value = tl.load(lambdas + token * lambda_step, mask=is_row, other=0)[:, None]
    if KIND == SINGLE:
        result = low
    elif KIND == PAIR:
        result = _between(low, high, value)
    else:
        if KIND == INT8:
            scale = tl.load(group_scales, mask=is_column)
            high *= scale.to(tl.float32)[None, :]
        result = tl.where(value == 0, low, low + value * high)
    if biases is not None:
        bias = biases + expert * 2 * columns + column
        bias_low = tl.load(bias, mask=is_column, other=0).to(tl.float32)
        bias_high = tl.load(bias + columns, mask=is_column, other=0).to(tl.float32)
        result += _between(bias_low[None, :], bias_high[None, :], value)
    target = out + out_index[:, None].to(tl.int64) * columns + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _sum_splits(partial, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.load(partial + index, mask=mask, other=0)
    for split in range(1, SPLITS):
        total += tl.load(partial + split * size + index, mask=mask, other=0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)


# --- Dense products -----------------------------------------------------------------------------


@torch.library.custom_op("mi::pair_linear", mutates_args=())
def pair_linear(x: Tensor, instruct: Tensor, thinking: Tensor, lambdas: Tensor) -> Tensor:
    """Multiplies `x` `[M, K]` by both `[N, K]` matrices; returns `[M, N]`.

    `lambdas` is fp32 `[M]` or `[1]`.
    """
    return _dense(x, _Matrices(instruct, thinking), lambdas)


@pair_linear.register_fake
def _(x: Tensor, instruct: Tensor, thinking: Tensor, lambdas: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], instruct.shape[0])


@torch.library.custom_op("mi::delta_linear", mutates_args=())
def delta_linear(x: Tensor, base: Tensor, delta: Tensor, scales: Tensor, lambdas: Tensor) -> Tensor:
    """Multiplies `x` `[M, K]` by `base` `[N, K]` and a quantized difference; returns `[M, N]`.

    `delta` is int8 `[N, K]` with `scales` `[N, 1]`, or int4 in uint8 `[N, groups · group / 2]` with
    `scales` `[N, groups]`. `lambdas` is fp32 `[M]` or `[1]`.
    """
    return _dense(x, _Matrices(base, delta, scales), lambdas)


@delta_linear.register_fake
def _(x: Tensor, base: Tensor, delta: Tensor, scales: Tensor, lambdas: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], base.shape[0])


@dataclass(frozen=True, slots=True)
class _Matrices:
    """The matrices of a product, `[N, K]`, or `[experts, N, K]`."""

    first: Tensor
    second: Tensor | None = None
    scales: Tensor | None = None

    @property
    def kind(self) -> int:
        return 0 if self.second is None else KINDS.get(self.second.dtype, 1)

    @property
    def group(self) -> int | None:
        """The number of inputs that share a scale; None unless int4."""
        if self.scales is None or self.second is None or self.second.dtype is not torch.uint8:
            return None
        return 2 * self.second.shape[-1] // self.scales.shape[-1]

    @property
    def strides(self) -> dict[str, int]:
        """The stride arguments of the kernel."""
        found: dict[str, int] = {}
        for name in ("first", "second", "scales"):
            tensor = getattr(self, name)
            steps = (0, 0, 0) if tensor is None else tensor.stride()
            expert, row, column = steps if len(steps) == 3 else (0, *steps)
            found |= {f"{name}_expert": expert, f"{name}_row": row, f"{name}_column": column}
        return found


def _dense(x: Tensor, matrices: _Matrices, lambdas: Tensor) -> Tensor:
    (rows, depth), columns = x.shape, len(matrices.first)
    out = x.new_empty(rows, columns)
    if not rows:
        return out
    tiles = tiles_for(rows, x.dtype, matrices.group)
    blocks = triton.cdiv(rows, tiles.rows)
    splits = splits_for(blocks * triton.cdiv(columns, tiles.columns), depth, tiles)
    split_depth = triton.cdiv(triton.cdiv(depth, splits), tiles.depth) * tiles.depth
    splits = triton.cdiv(depth, split_depth)
    if splits == 1:
        return _launch(x, matrices, lambdas, out, tiles, blocks)
    partial = x.new_empty(splits, rows, columns, dtype=torch.float32)
    _launch(x, matrices, lambdas, partial, tiles, blocks, split_depth)
    grid = (triton.cdiv(out.numel(), SUM_BLOCK),)
    _sum_splits[grid](partial, out, out.numel(), SPLITS=splits, BLOCK=SUM_BLOCK)
    return out


def _launch(
    x: Tensor,
    matrices: _Matrices,
    lambdas: Tensor,
    out: Tensor,  # `[splits, rows, columns]`, or `[rows, columns]`
    tiles: Tiles,
    blocks: int,
    split_depth: int | None = None,
    experts: "_Experts | None" = None,
) -> Tensor:
    *splits, rows, columns = out.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    depth = x.shape[-1]
    experts = experts or _Experts()
    grid = blocks, triton.cdiv(columns, tiles.columns), *(splits or [1])
    _product[grid](
        x=x,
        first=matrices.first,
        second=matrices.second,
        scales=matrices.scales,
        lambdas=lambdas,
        out=out,
        rows=rows,
        columns=columns,
        depth=depth,
        split_depth=split_depth or depth,
        lambda_step=int(len(lambdas) > 1),
        x_row=x.stride(0),
        **matrices.strides,
        **experts.arguments,
        KIND=matrices.kind,
        WHOLE=depth % tiles.depth == 0,
        UPCAST=INTERPRETED and x.dtype is torch.bfloat16,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


# --- Grouped by expert --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alignment:
    """Assignments of rows to experts, sorted by expert and divided into blocks of one expert.

    It is made on the device, and all shapes depend only on the numbers of rows and experts.
    """

    order: Tensor  # [assignments]: row · top_k + choice
    owners: Tensor  # [blocks] the expert of each block
    begins: Tensor  # [blocks] first position in `order`; number of assignments if unused
    edges: Tensor  # [experts + 1] first position in `order` of each expert, then the end
    top_k: int
    block: int  # rows per block


def align(expert_ids: Tensor, experts: int) -> Alignment:
    """Returns the alignment of `expert_ids` `[rows, top_k]`."""
    assignments, top_k = expert_ids.numel(), expert_ids.shape[1]
    block = tiles_for(triton.cdiv(assignments, experts), torch.bfloat16).rows
    # At most this many experts are used, and each has at most one block that is not full.
    used = min(assignments, experts)
    most = used + (assignments - used) // block
    ordered, order = expert_ids.flatten().sort(stable=True)
    device = order.device
    edges = torch.searchsorted(ordered, torch.arange(experts + 1, device=device))
    ends = ((edges.diff() + block - 1) // block).cumsum(
        0
    )  # [experts] blocks up to and with each expert
    number = torch.arange(most, device=device)
    owners = torch.searchsorted(ends, number, right=True)
    starts = torch.nn.functional.pad(ends, (1, 0))
    begins = edges.gather(0, owners) + (number - starts.gather(0, owners)) * block
    return Alignment(order, owners, begins, edges, top_k, block)


def grouped_linear(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    scales: Tensor | None,
    biases: Tensor | None,
    lambdas: Tensor,
    alignment: Alignment,
    gather: bool,
) -> Tensor:
    """Multiplies every assignment by its expert's matrices; returns `[assignments, N]`.

    `first` and `second` are `[experts, N, K]`: `second` is Thinking or a quantized difference, as
    above, or None if `first` serves all rows. `biases` are `[experts, 2, N]`, of both endpoints.
    With `gather`, `x` is `[rows, K]` and the result is in the order of the alignment. Without, `x`
    is in that order, and the result in the order of the assignments. `lambdas` is fp32 `[rows]` or
    `[1]`.
    """
    out: Tensor = _grouped_linear(
        *(x, first, second, scales, biases, lambdas),
        *(alignment.order, alignment.owners, alignment.begins, alignment.edges),
        *(alignment.top_k, alignment.block, gather),
    )
    return out


@torch.library.custom_op("mi::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    scales: Tensor | None,
    biases: Tensor | None,
    lambdas: Tensor,
    order: Tensor,
    owners: Tensor,
    begins: Tensor,
    edges: Tensor,
    top_k: int,
    block: int,
    gather: bool,
) -> Tensor:
    matrices = _Matrices(first, second, scales)
    experts = _Experts(biases, order, owners, begins, edges, top_k, gather)
    out = x.new_empty(len(order), first.shape[1])
    tiles = tiles_for(block, x.dtype, matrices.group)
    return _launch(x, matrices, lambdas, out, tiles, len(begins), experts=experts)


@_grouped_linear.register_fake
def _(x: Tensor, first: Tensor, *others: Any) -> Tensor:
    order: Tensor = others[4]
    return x.new_empty(order.shape[0], first.shape[1])


@dataclass(frozen=True, slots=True)
class _Experts:
    """The kernel's arguments about experts; all None for a dense product."""

    biases: Tensor | None = None
    order: Tensor | None = None
    owners: Tensor | None = None
    begins: Tensor | None = None
    edges: Tensor | None = None
    top_k: int = 1
    gather: bool = False

    @property
    def arguments(self) -> dict[str, Tensor | int | None]:
        """The arguments of the kernel."""
        tensors = ("biases", "order", "owners", "begins", "edges")
        return {
            **{name: getattr(self, name) for name in tensors},
            "GROUPED": self.order is not None,
            "GATHER": self.gather,
            "TOP_K": self.top_k,
        }
