"""Attention over paged KV, as one function registered with `transformers`.

The KV cache of a layer is `[blocks + 1, block_size, kv_heads, head_dim]`, keys and values apart.
The last block is spare: it belongs to no sequence, fills up block tables, and takes what padding
writes. A plan says how the rows of a batch attend, in one form for decodes and prefill chunks; a
backend computes it. Here is the reference for every device; `attention_backends` knows the others.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_runtime.errors import UnsupportedModel

ATTENTION_NAME = "mi_paged"


class AttentionContext(Protocol):
    """What a model forward hands down to its attention layers as `attention_context`."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`[tokens, heads, dim]` each, and the same out; `window` counts the token itself."""
        ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_context: AttentionContext,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls: `[1, heads, tokens, dim]` in, `[1, tokens, heads, dim]` out."""
    unsupported = sorted(name for name in _MEANINGFUL if others.get(name) is not None)
    if unsupported or attention_mask is not None:
        raise UnsupportedModel(f"attention with {', '.join(unsupported) or 'a mask of its own'}")
    out = attention_context.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling,
        window=sliding_window,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


# keyword arguments of attention functions that would change the result
_MEANINGFUL = {
    "softcap",
    "position_bias",
    "head_mask",
    "indexer",
    "block_mask",
    "cache_position_bias",
}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer: its KV of a token, and what reads it."""

    kv_heads: int
    key_dim: int
    value_dim: int
    heads: int  # of queries
    window: int | None = None  # tokens that a token sees, itself counted; None: all before it
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Prefill:
    """A chunk of one sequence: rows [first, first + length) of the batch, after `start` tokens."""

    first: int
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the rows of one flat batch attend: its chunks, each at the end of a sequence's KV.

    Tensors are on the device and all that a kernel reads; numbers are known on the host, and those
    called longest are upper bounds. Captured graphs have the tensors as buffers and the bounds at
    their capacity; there a row that is padding has length 1 and its slot in the null block.
    """

    slots: Tensor  # [tokens] int64: where each token's KV goes, block · block_size + offset
    query_starts: Tensor  # [chunks + 1] int32: first row of each chunk, then the number of rows
    lengths: Tensor  # [chunks] int32: tokens of each chunk's sequence, the chunk's own counted
    tables: Tensor  # [chunks, blocks of the longest] int32, filled up with the null block
    longest_decode: int  # tokens of a sequence among the decodes; 0 without any
    longest_query: int  # rows of a chunk
    longest: int  # tokens of a sequence
    prefills: tuple[Prefill, ...]  # for the reference: the chunks behind the decodes
    opened: Tensor  # for the reference: blocks filled in part, from their first slot on; int64

    @property
    def decodes(self) -> int:
        """So many chunks, the first ones, are single tokens."""
        return len(self.lengths) - len(self.prefills)

    @property
    def by_rows(self) -> tuple[Tensor, ...]:
        """The tensors whose size goes with the number of rows."""
        return self.slots, self.query_starts, self.lengths, self.tables


class AttentionBackend(Protocol):
    """Writes a layer's KV and attends over it; `keys` and `values` are that layer's cache."""

    name: str

    def write(
        self, plan: AttentionPlan, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Puts the KV `[tokens, kv_heads, dim]` of the batch's rows in their slots."""
        ...

    def attend(
        self,
        plan: AttentionPlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`[tokens, heads, key_dim]` in, `[tokens, heads, value_dim]` out."""
        ...


class PagedAttention:
    """The KV of all layers and the attention of one step over it."""

    def __init__(
        self,
        shapes: tuple[LayerShape, ...],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.block_size = block_size
        self.null_block = num_blocks
        self.backend = backend or ReferenceAttention()

        def cache(shape: LayerShape, dim: int) -> Tensor:
            size = (num_blocks + 1, block_size, shape.kv_heads, dim)
            return torch.zeros(size, dtype=dtype, device=device)

        self._keys = [cache(shape, shape.key_dim) for shape in shapes]
        self._values = [cache(shape, shape.value_dim) for shape in shapes]
        self.plan: AttentionPlan | None = None

    @property
    def caches(self) -> tuple[Tensor, ...]:
        """Keys, then values of each layer, `[blocks + 1, …]`."""
        return *self._keys, *self._values

    def begin(self, plan: AttentionPlan) -> None:
        """Sets how the rows of the next forward attend."""
        self.plan = plan

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        own = self.of_layer(layer)
        return own.attend(layer, query, key, value, scale=scale, window=window, sinks=sinks)

    def of_layer(self, layer: int) -> "LayerAttention":
        """What one layer needs for the next forward."""
        assert self.plan is not None
        return LayerAttention(self.backend, self.plan, self._keys[layer], self._values[layer])


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's KV, and how the rows of one step attend over it.

    It is all that a compiled layer knows of attention, and never which layer it is: so the code is
    the same for all.
    """

    backend: AttentionBackend
    plan: AttentionPlan
    keys: Tensor
    values: Tensor

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.backend.write(self.plan, self.keys, self.values, key, value)
        return self.backend.attend(
            self.plan, query, self.keys, self.values, scale=scale, window=window, sinks=sinks
        )


class ReferenceAttention:
    """For every device: gathers each sequence's blocks, then `scaled_dot_product_attention`.

    Decodes go through it together, prefill chunks one by one. A gather reads whole blocks, and a
    masked NaN would still reach a sum: so the part of a block that is not written yet is kept at
    zero, and the null block, which fills up tables, holds nothing that is not finite. Cost of a
    decode: one copy of the keys and values read, padded to the longest row.
    """

    name = "reference"

    def __init__(self) -> None:
        self._plan: AttentionPlan | None = None  # of the masks
        self._decode_masks: dict[int | None, Tensor] = {}

    def write(
        self, plan: AttentionPlan, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
    ) -> None:
        for cache, new in ((keys, key), (values, value)):
            if len(plan.opened):
                cache.index_fill_(0, plan.opened, 0)
            cache.flatten(0, 1).index_copy_(0, plan.slots, new)

    def attend(
        self,
        plan: AttentionPlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        outputs = []
        if plan.decodes:
            rows = slice(0, plan.decodes)
            tables = plan.tables[rows, : -(-plan.longest_decode // keys.shape[1])]
            mask = self._decode_mask(plan, window, tables.shape[1] * keys.shape[1])
            own = _rows_of(sinks, rows)
            outputs.append(_decode(query[rows], keys, values, tables, mask, scale, own))
        for chunk, table in zip(plan.prefills, plan.tables[plan.decodes :], strict=True):
            rows = slice(chunk.first, chunk.first + chunk.length)
            own = _rows_of(sinks, rows)
            outputs.append(_prefill(query[rows], keys, values, table, chunk, scale, window, own))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode_mask(self, plan: AttentionPlan, window: int | None, width: int) -> Tensor:
        """`[decodes, 1, 1, width]` bool: the positions each decode sees. Made once a step."""
        if self._plan is not plan:
            self._plan = plan
            self._decode_masks.clear()
        if window not in self._decode_masks:
            positions = torch.arange(width, device=plan.lengths.device)
            ends = plan.lengths[: plan.decodes].unsqueeze(1)
            seen = positions < ends
            if window is not None:
                seen &= positions >= ends - window
            self._decode_masks[window] = seen[:, None, None, :]
        return self._decode_masks[window]


def _rows_of(sinks: Tensor | None, rows: slice) -> Tensor | None:
    """Sinks are `[heads]`, `[1, heads]` where all rows share one λ, or `[tokens, heads]`."""
    return sinks if sinks is None or sinks.dim() == 1 or len(sinks) == 1 else sinks[rows]


def _decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """One token a sequence. The query heads of a KV head stand in the place of query positions."""
    rows, heads, _ = query.shape
    kv_heads = keys.shape[2]
    flat = tables.flatten()
    k = keys.index_select(0, flat).view(rows, -1, kv_heads, keys.shape[3]).transpose(1, 2)
    v = values.index_select(0, flat).view(rows, -1, kv_heads, values.shape[3]).transpose(1, 2)
    q = query.reshape(rows, kv_heads, heads // kv_heads, -1)
    if sinks is not None:
        sinks = sinks.expand(rows, heads).reshape(rows, kv_heads, -1, 1)
    return _attention(q, k, v, mask, scale, sinks).reshape(rows, heads, -1)


def _prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    chunk: Prefill,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """One chunk of one sequence over its cached prefix and itself, causally."""
    end = chunk.start + chunk.length
    blocks = table[: -(-end // keys.shape[1])]
    k = keys.index_select(0, blocks).flatten(0, 1)[:end].transpose(0, 1).unsqueeze(0)
    v = values.index_select(0, blocks).flatten(0, 1)[:end].transpose(0, 1).unsqueeze(0)
    q = query.transpose(0, 1).unsqueeze(0)
    mask = causal_mask(chunk.start, end, window, query.device)
    if sinks is not None:
        sinks = sinks.expand(chunk.length, -1).mT.reshape(1, query.shape[1], chunk.length, 1)
    return _attention(q, k, v, mask, scale, sinks)[0].transpose(0, 1)


def causal_mask(start: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """`[end - start, end]` bool: which of `end` positions each of the last ones sees."""
    own = torch.arange(start, end, device=device).unsqueeze(1)
    positions = torch.arange(end, device=device)
    seen = positions <= own
    return seen if window is None else seen & (positions > own - window)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Masked attention `[batch, heads, queries, dim]`; KV heads are shared by groups of heads.

    `sinks` `[batch, heads, queries, 1]` are extra scores that take probability and give nothing.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    scores = torch.cat((scores, sinks.to(scores.dtype)), dim=-1)
    return scores.softmax(-1, dtype=torch.float32)[..., :-1].to(q.dtype) @ v


class PackedAttention:
    """Causal attention over whole sequences packed in one batch, without a cache: the slow twin.

    `lengths` are those of the packed sequences. Also records every layer's shape.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self._lengths = lengths
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.shapes[layer] = LayerShape(
            kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            heads=query.shape[1],
            window=window,
            sinks=sinks is not None,
        )
        outputs, first = [], 0
        for length in self._lengths:
            rows = slice(first, first + length)
            q, k, v = (x[rows].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            own = _rows_of(sinks, rows)
            if own is not None:
                own = own.expand(length, -1).mT.reshape(1, -1, length, 1)
            mask = causal_mask(0, length, window, query.device)
            outputs.append(_attention(q, k, v, mask, scale, own)[0].transpose(0, 1))
            first += length
        return torch.cat(outputs)
