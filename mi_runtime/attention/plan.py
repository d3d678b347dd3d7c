"""How the rows of one batch attend over paged KV, and the interface of an attention backend.

The KV cache of a layer is two tensors, keys and values, each `[blocks + 1, block_size, kv_heads,
head_dim]`. The last block is the null block: it belongs to no sequence, fills up block tables, and
takes what padding rows write. An `AttentionPlan` has one form for decodes and for prefill chunks.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of one attention layer: the KV of a token, and the query heads that read it."""

    kv_heads: int
    key_dim: int
    value_dim: int
    heads: int  # query heads
    window: int | None = None  # tokens that a token attends to, itself included; None: all
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prefill chunk: rows [first, first + length) of the batch, after `start` cached tokens."""

    first: int
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the rows of one flat batch attend. Each chunk is the end of its sequence's KV.

    Kernels read only the tensors, which are on the device. The numbers are known on the host, and
    those called longest are upper bounds. In a CUDA graph, the tensors are buffers and the
    bounds are their capacity; a padding row has length 1 and its slot in the null block.
    """

    slot_mapping: Tensor  # [tokens] int64: where each token's KV is written, block · size + offset
    query_starts: Tensor  # [chunks + 1] int32: first row of each chunk, then the number of rows
    lengths: Tensor  # [chunks] int32: tokens of each sequence up to the end of its chunk
    block_tables: Tensor  # [chunks, most blocks] int32, padded with the null block
    longest_decode: int  # tokens of the longest decoding sequence; 0 without decodes
    longest_query: int  # rows of the longest chunk
    longest: int  # tokens of the longest sequence
    prefills: tuple[Prefill, ...]  # for the reference: the chunks after the decodes
    partial_blocks: Tensor  # int64: blocks that the batch leaves partly filled; for the reference

    @property
    def decodes(self) -> int:
        """How many chunks are decodes; they come first."""
        return len(self.lengths) - len(self.prefills)

    @property
    def by_rows(self) -> tuple[Tensor, ...]:
        """The tensors whose size depends on the number of rows."""
        return self.slot_mapping, self.query_starts, self.lengths, self.block_tables


class AttentionBackend(Protocol):
    """Writes a layer's KV and attends over it; `keys` and `values` are that layer's KV cache."""

    name: str

    def write(
        self, plan: AttentionPlan, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Writes the KV `[tokens, kv_heads, dim]` of the batch's rows to their slots."""
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
        """Attends with `query` `[tokens, heads, key_dim]`; returns `[tokens, heads, value_dim]`.

        `window` counts the token itself. `sinks` are `[heads]`, `[1, heads]` if all rows share one
        λ, or `[tokens, heads]`.
        """
        ...
