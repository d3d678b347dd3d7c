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

    slot_mapping: Tensor  # [tokens] int64: where each token's KV goes, block · block_size + offset
    query_starts: Tensor  # [chunks + 1] int32: first row of each chunk, then the number of rows
    lengths: Tensor  # [chunks] int32: tokens of each chunk's sequence, the chunk's own counted
    block_tables: Tensor  # [chunks, blocks of the longest] int32, filled up with the null block
    longest_decode: int  # tokens of a sequence among the decodes; 0 without any
    longest_query: int  # rows of a chunk
    longest: int  # tokens of a sequence
    prefills: tuple[Prefill, ...]  # for the reference: the chunks behind the decodes
    partial_blocks: (
        Tensor  # for the reference: blocks filled in part, from their first slot on; int64
    )

    @property
    def decodes(self) -> int:
        """So many chunks, the first ones, are single tokens."""
        return len(self.lengths) - len(self.prefills)

    @property
    def by_rows(self) -> tuple[Tensor, ...]:
        """The tensors whose size goes with the number of rows."""
        return self.slot_mapping, self.query_starts, self.lengths, self.block_tables


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
