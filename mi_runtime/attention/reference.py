"""Attention in plain torch: the reference backend for every device, and attention without a cache.

`ReferenceAttention` serves on a CPU and checks the other backends. `PackedAttention` is the
reference implementation of paged attention: it needs no KV cache, and the checks at load use it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_runtime.attention.plan import AttentionPlan, LayerShape, Prefill


class ReferenceAttention:
    """Gathers the blocks of each sequence, then calls `scaled_dot_product_attention`.

    Decodes are computed together, prefill chunks one by one. A gather reads entire blocks, and a
    masked NaN would still reach a sum. Therefore the unwritten part of a block is kept at zero, and
    the null block, which pads block tables, holds only finite numbers. A decode step costs one copy
    of the keys and values that it reads, padded to the longest sequence.
    """

    name = "reference"

    def __init__(self) -> None:
        self._plan: AttentionPlan | None = None  # the plan of the masks
        self._decode_masks: dict[int | None, Tensor] = {}

    def write(
        self, plan: AttentionPlan, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
    ) -> None:
        for cache, new in ((keys, key), (values, value)):
            if len(plan.partial_blocks):
                cache.index_fill_(0, plan.partial_blocks, 0)
            cache.flatten(0, 1).index_copy_(0, plan.slot_mapping, new)

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
            tables = plan.block_tables[rows, : -(-plan.longest_decode // keys.shape[1])]
            mask = self._decode_mask(plan, window, tables.shape[1] * keys.shape[1])
            row_sinks = _rows_of(sinks, rows)
            outputs.append(_decode(query[rows], keys, values, tables, mask, scale, row_sinks))
        for chunk, table in zip(plan.prefills, plan.block_tables[plan.decodes :], strict=True):
            rows = slice(chunk.first, chunk.first + chunk.length)
            arguments = chunk, scale, window, _rows_of(sinks, rows)
            outputs.append(_prefill(query[rows], keys, values, table, *arguments))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode_mask(self, plan: AttentionPlan, window: int | None, width: int) -> Tensor:
        """Returns the positions that each decode attends to, bool `[decodes, 1, 1, width]`.

        A mask is made once per step and window.
        """
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
    """Returns the sinks of these rows, if sinks differ between rows.

    Sinks are `[heads]`, `[1, heads]` if all rows share one λ, or `[tokens, heads]`.
    """
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
    """Attends with one token per sequence.

    The query heads that share a KV head are computed as if they were queries of one head.
    """
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
    """Attends with one chunk of a sequence to its cached prefix and itself, causally."""
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
    """Returns which of the first `end` positions each position from `start` on attends to.

    It is bool `[end - start, end]`.
    """
    queries = torch.arange(start, end, device=device).unsqueeze(1)
    positions = torch.arange(end, device=device)
    seen = positions <= queries
    return seen if window is None else seen & (positions > queries - window)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Computes masked attention `[batch, heads, queries, dim]` with grouped query heads.

    `sinks` `[batch, heads, queries, 1]` are extra scores that take probability but have no value.
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
    """Causal attention over complete sequences packed in one batch, without a KV cache.

    `lengths` are the lengths of the sequences. It also records every layer's shape.
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
            row_sinks = _rows_of(sinks, rows)
            if row_sinks is not None:
                row_sinks = row_sinks.expand(length, -1).mT.reshape(1, -1, length, 1)
            mask = causal_mask(0, length, window, query.device)
            outputs.append(_attention(q, k, v, mask, scale, row_sinks)[0].transpose(0, 1))
            first += length
        return torch.cat(outputs)
