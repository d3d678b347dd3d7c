"""Paged attention in Triton: a kernel that writes KV, and kernels that attend over it.

    out[row] = softmax(scale · q K^T) V     over the tokens that the row sees, causally

It is computed in one pass with a running maximum and sum (fp32, base 2), as in FlashAttention
(arXiv 2205.14135). The kernel has two specializations: one for the decodes of a batch, one for its
prefill chunks, which attend to their cached prefix and themselves. A program computes one KV head.
The rows of its matrix product are all query heads of that KV head times as many queries as fit. It
walks over tiles of tokens, finds each token's slot in the block table, and skips tiles before a
sliding window. A tile need not be a block.

Few queries over long sequences would leave most of the device idle. Their tokens are then divided
among `splits` programs, in proportion to each sequence's own length, and a second kernel adds up
the partial results (split-KV decoding, as in FlashDecoding). The host chooses `splits` from the
batch and an upper bound of the lengths, so it is the same in every replay of a CUDA graph. A
program without any token to read marks its partial result as empty.

A slot that no token of the sequence has is never read, so that a NaN there changes nothing. Shapes
and addresses depend only on host numbers, and nothing waits for the device. The
reference implementation is `mi_runtime.attention.reference.ReferenceAttention`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mi_runtime.kernels.triton_support import triton_interpreted

LEAST_SPLIT: Final = 128  # tokens per split; fewer are not worth another program
MOST_SPLITS: Final = 64
# Programs per multiprocessor that splitting aims at. Decodes wait for memory: twice as many as fit
# at once even out different lengths. Prefill is compute-bound: one is enough.
DECODE_PROGRAMS, PREFILL_PROGRAMS = 6, 1


@dataclass(frozen=True, slots=True)
class Tiles:
    """How much one program processes at once, and how it is compiled."""

    rows: int  # queries times the query heads of a KV head
    tokens: int  # of KV
    warps: int
    stages: int  # loads in flight


# By padded head size, for elements of two bytes. Chosen by the registers and shared memory that the
# compiler reports, not by measurement.
DECODE: Final = {
    90: {64: Tiles(16, 128, 4, 3), 128: Tiles(16, 64, 4, 3), 256: Tiles(16, 32, 4, 3)},
    80: {64: Tiles(16, 64, 4, 3), 128: Tiles(16, 64, 4, 3), 256: Tiles(16, 32, 4, 3)},
}
PREFILL: Final = {
    90: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 3)},
    80: {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
}
INTERPRETED: Final = Tiles(16, 16, 1, 1)  # small, so that tests cross every boundary


def tiles_for(architecture: int, dim: int, dtype: torch.dtype, *, decode: bool) -> Tiles:
    """Returns the tiles for heads of `dim`.

    `architecture` is 90 for compute capability 9.0, and 0 if kernels are interpreted.
    """
    if architecture == 0:
        return INTERPRETED
    generation = 90 if 90 <= architecture < 120 else 80  # 12.x has as little shared memory as 8.6
    tiles = (DECODE if decode else PREFILL)[generation][min(256, max(64, _padded(dim)))]
    if dtype.itemsize > 2:
        return replace(tiles, rows=min(64, tiles.rows), tokens=16, stages=2)
    return tiles


def number_of_splits(programs: int, wanted: int, longest: int) -> int:
    """Returns into how many splits to divide each of `programs`, to have about `wanted` programs.

    It is a power of two. `longest` is an upper bound of the tokens of a sequence.
    """
    splits = min(wanted / max(1, programs), longest / LEAST_SPLIT, MOST_SPLITS)
    return int(1 << round(math.log2(splits))) if splits > 1 else 1


@triton.jit(
    do_not_specialize=["window", "decodes", "chunks", "table_stride", "sink_stride"],
    do_not_specialize_on_alignment=["block_tables", "lengths", "query_starts", "sinks"],
)
def attend_kernel(
    out,  # [tokens, KV_HEADS · GROUP, VALUE_DIM]
    partial,  # [tokens, heads, splits, VALUE_DIM] fp32, tokens of this launch; None: no splits
    partial_lse,  # [tokens, heads, splits] fp32: log2 of the sum of exponentials
    query,  # [tokens, heads, KEY_DIM]
    keys,  # [blocks, BLOCK_SIZE, KV_HEADS, KEY_DIM]
    values,  # [blocks, BLOCK_SIZE, KV_HEADS, VALUE_DIM]
    block_tables,  # [chunks, width]
    lengths,  # [chunks]
    query_starts,  # [chunks + 1]
    sinks,  # [·, heads] or None
    scale,  # of scores in base 2
    window,
    decodes,
    chunks,
    table_stride,
    sink_stride,  # 0 if all tokens have the same sinks
    query_token_stride,
    query_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (decodes, or tiles of prefill queries; KV heads; splits)."""
    QUERIES: tl.constexpr = 1 if DECODE else ROWS // GROUP  # per program
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)

    if DECODE:
        chunk = tl.program_id(0)
        first = chunk
        end = chunk + 1
    else:
        # The last chunk whose first tile is not after this one. A chunk may have one unused tile.
        chunk = decodes
        above = chunks
        while chunk + 1 < above:
            middle = (chunk + above) // 2
            starts_at = (tl.load(query_starts + middle) - decodes) // QUERIES + middle - decodes
            if starts_at <= tl.program_id(0):
                chunk = middle
            else:
                above = middle
        first = tl.load(query_starts + chunk)
        end = tl.load(query_starts + chunk + 1)
        tile = tl.program_id(0) - (first - decodes) // QUERIES - chunk + decodes
        first += tile * QUERIES
        if first >= end:
            return
    length = tl.load(lengths + chunk)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = (row < QUERIES * GROUP) & (token < end)
    own = length - end + token  # position of each row's token in its sequence

    low = 0
    high = length - end + tl.minimum(first + QUERIES, end)
    if WINDOWED:
        low = tl.maximum(0, length - end + first - window + 1)
    if partial is not None:
        span = tl.cdiv(tl.cdiv(high - low, tl.num_programs(2)), TILE) * TILE
        span = tl.maximum(span, 2 * TILE)
        low += split * span
        high = tl.minimum(high, low + span)
        own_token = token if DECODE else token - decodes
        at = (own_token.to(tl.int64) * (KV_HEADS * GROUP) + head) * tl.num_programs(2) + split
        if low >= high:
            tl.store(partial_lse + at, float("-inf"), mask=valid)
            return

    key_column = tl.arange(0, KEY_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    q = tl.load(
        query
        + token.to(tl.int64)[:, None] * query_token_stride
        + head.to(tl.int64)[:, None] * query_head_stride  # heads may come before tokens in memory
        + key_column[None, :],
        mask=valid[:, None] & (key_column < KEY_DIM)[None, :],
        other=0.0,
    )
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:  # a score that takes probability but has no value, counted once
        sink = tl.load(sinks + token * sink_stride + head, mask=valid, other=0.0)
        if split == 0:
            largest = sink.to(tl.float32) * 1.4426950408889634
            total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.zeros([ROWS, VALUE_PAD], tl.float32)

    table = block_tables + chunk.to(tl.int64) * table_stride
    keys += kv_head * KEY_DIM
    values += kv_head * VALUE_DIM
    position = low + tl.arange(0, TILE)
    # Block numbers are read one tile ahead, so that the compiler can prefetch keys and values.
    block = tl.load(table + position // BLOCK_SIZE, mask=position < high, other=0)
    for _ in range(low, high, TILE):
        inside = position < high
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        k = tl.load(
            keys + slot[:, None] * (KV_HEADS * KEY_DIM) + key_column[None, :],
            mask=inside[:, None] & (key_column < KEY_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            values + slot[:, None] * (KV_HEADS * VALUE_DIM) + value_column[None, :],
            mask=inside[:, None] & (value_column < VALUE_DIM)[None, :],
            other=0.0,
        )
        following = position + TILE
        block = tl.load(table + following // BLOCK_SIZE, mask=following < high, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = inside[None, :]
        if not DECODE:
            seen = seen & (position[None, :] <= own[:, None])
            if WINDOWED:
                seen = seen & (position[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see no token of a tile
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")
        largest = larger
        position = following

    total = tl.where(total == 0.0, 1.0, total)  # if a row sees no token, largest is -inf
    sums = sums / total[:, None]
    mask = valid[:, None] & (value_column < VALUE_DIM)[None, :]
    if partial is not None:
        tl.store(partial + at[:, None] * VALUE_DIM + value_column[None, :], sums, mask=mask)
        tl.store(partial_lse + at, largest + tl.log2(total), mask=valid)
    else:
        at = token.to(tl.int64) * (KV_HEADS * GROUP) + head
        address = out + at[:, None] * VALUE_DIM + value_column[None, :]
        tl.store(address, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_parts_kernel(
    out,  # [tokens, heads, VALUE_DIM]
    partial,  # [tokens, heads, SPLITS, VALUE_DIM] fp32
    partial_lse,  # [tokens, heads, SPLITS] fp32; -inf: an empty split
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: (tokens · heads,)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, VALUE_PAD)
    inside = column < VALUE_DIM
    lse = tl.load(partial_lse + row * SPLITS + split)
    outputs = tl.load(
        partial + (row * SPLITS + split)[:, None] * VALUE_DIM + column[None, :],
        mask=(lse > float("-inf"))[:, None] & inside[None, :],
        other=0.0,
    )
    weights = tl.exp2(lse - tl.max(lse, 0))
    sums = tl.sum(outputs * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * VALUE_DIM + column, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def write_kernel(
    keys,  # [slots, HEADS, KEY_DIM]
    values,  # [slots, HEADS, VALUE_DIM]
    key,  # [tokens, HEADS, KEY_DIM]
    value,  # [tokens, HEADS, VALUE_DIM]
    slot_mapping,  # [tokens] int64
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    head = tl.arange(0, HEADS_PAD)[:, None]
    column = tl.arange(0, KEY_PAD)[None, :]
    mask = (head < HEADS) & (column < KEY_DIM)
    x = tl.load(key + token * key_token_stride + head * key_head_stride + column, mask=mask)
    tl.store(keys + slot * (HEADS * KEY_DIM) + head * KEY_DIM + column, x, mask=mask)
    column = tl.arange(0, VALUE_PAD)[None, :]
    mask = (head < HEADS) & (column < VALUE_DIM)
    x = tl.load(value + token * value_token_stride + head * value_head_stride + column, mask=mask)
    tl.store(values + slot * (HEADS * VALUE_DIM) + head * VALUE_DIM + column, x, mask=mask)


@torch.library.custom_op("mi::write_kv", mutates_args=("keys", "values"))
def write_kv(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor
) -> None:
    """Writes `key` and `value` `[tokens, kv_heads, dim]` to their slots in a layer's KV cache."""
    assert keys.is_contiguous()
    assert values.is_contiguous()
    key, value = _dense_rows(key), _dense_rows(value)
    heads, key_dim, value_dim = key.shape[1], key.shape[2], value.shape[2]
    write_kernel[len(slot_mapping),](
        *(keys, values, key, value, slot_mapping),
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        HEADS=heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        HEADS_PAD=triton.next_power_of_2(heads),
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_PAD=triton.next_power_of_2(value_dim),
    )


@write_kv.register_fake
def _(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None: ...


@torch.library.custom_op("mi::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    decodes: int,
    longest_decode: int,
    longest: int,
    splits: int = 0,
) -> Tensor:
    """Attends with `query` `[tokens, heads, key_dim]`; returns `[tokens, heads, value_dim]`.

    Block tables, lengths and query starts are those of an `AttentionPlan`. Sinks are `[heads]`,
    `[1, heads]` or `[tokens, heads]`. `splits` is the number of programs among which the tokens of
    a sequence are divided; 0 means as many as keep the device busy.
    """
    assert keys.is_contiguous()
    assert values.is_contiguous()
    query = _dense_rows(query)
    sinks = None if sinks is None else _dense_rows(sinks)
    out = query.new_empty(*query.shape[:2], values.shape[3])
    sink_stride = 0 if sinks is None or sinks.dim() == 1 or len(sinks) == 1 else sinks.stride(0)
    arguments = (
        *(
            query,
            keys,
            values,
            block_tables,
            lengths,
            query_starts,
            sinks,
            scale * math.log2(math.e),
        ),
        *(window or 0, decodes, len(block_tables), block_tables.stride(0), sink_stride),
        *(query.stride(0), query.stride(1)),
    )
    if decodes:
        settings = attend_settings(query, keys, values, window, decode=True)
        wanted = DECODE_PROGRAMS * processors(query.device)
        seen = longest_decode if window is None else min(window, longest_decode)
        count = splits or number_of_splits(decodes * keys.shape[2], wanted, seen)
        _launch(out, out[:decodes], decodes, count, arguments, settings)
    if len(query) > decodes:
        settings = attend_settings(query, keys, values, window, decode=False)
        queries = settings["ROWS"] // settings["GROUP"]
        # Each chunk may need one tile more than the division counts.
        tiles = (len(query) - decodes) // queries + len(block_tables) - decodes
        wanted = PREFILL_PROGRAMS * processors(query.device)
        seen = longest if window is None else min(window + queries, longest)
        count = splits or number_of_splits(tiles * keys.shape[2], wanted, seen)
        _launch(out, out[decodes:], tiles, count, arguments, settings)
    return out


def _launch(
    out: Tensor,
    rows: Tensor,
    tiles: int,
    splits: int,
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
) -> None:
    """Launches one specialization, which computes `rows`, a part of `out`."""
    grid = (tiles, settings["KV_HEADS"], splits)
    if splits == 1:
        attend_kernel[grid](out, None, None, *arguments, **settings)
        return
    tokens, heads, dim = rows.shape
    partial = rows.new_empty(tokens, heads, splits, dim, dtype=torch.float32)
    lse = rows.new_empty(tokens, heads, splits, dtype=torch.float32)
    attend_kernel[grid](out, partial, lse, *arguments, **settings)
    add_parts_kernel[tokens * heads,](
        *(rows, partial, lse),
        VALUE_DIM=dim,
        VALUE_PAD=triton.next_power_of_2(dim),
        SPLITS=splits,
    )


@paged_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    decodes: int,
    longest_decode: int,
    longest: int,
    splits: int = 0,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


def attend_settings(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, *, decode: bool
) -> dict[str, Any]:
    """Returns the compile-time arguments of `attend_kernel`."""
    key_dim, value_dim = keys.shape[3], values.shape[3]
    group = query.shape[1] // keys.shape[2]
    tiles = tiles_for(
        architecture(query.device), max(key_dim, value_dim), query.dtype, decode=decode
    )
    return {
        "KV_HEADS": keys.shape[2],
        "GROUP": group,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_PAD": _padded(key_dim),
        "VALUE_PAD": _padded(value_dim),
        "BLOCK_SIZE": keys.shape[1],
        "DECODE": decode,
        "WINDOWED": window is not None,
        "ROWS": max(tiles.rows, triton.next_power_of_2(group)),
        "TILE": tiles.tokens,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def architecture(device: torch.device) -> int:
    """Returns 90 for compute capability 9.0, and 0 if kernels are interpreted."""
    if triton_interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of the device, 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _padded(dim: int) -> int:
    """Returns the next size that a matrix product supports: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(dim)))


def _dense_rows(x: Tensor) -> Tensor:
    """Returns `x` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
