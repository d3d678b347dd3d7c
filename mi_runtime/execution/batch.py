"""Builds the flat batch of a sub-batch: the tensors that one forward pass reads.

Rows of decodes come first, as the scheduler orders them, then prefill chunks. All tensors are made
as NumPy arrays on the host and sent in one copy.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mi_runtime.attention.plan import AttentionPlan, Prefill
from mi_runtime.device.transfer import Array, arrays_on_device
from mi_runtime.model.row_lambdas import StepRows
from mi_runtime.request import Dial
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch
from mi_runtime.scheduling.sequence import Sequence

NOTHING_SAMPLED: Final[Mapping[Sequence, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PlaceholderTokens:
    """Rows whose token id is not known yet: the step in flight is sampling it."""

    rows: Tensor  # [any] int64: rows of this batch, whose id is 0 until then
    sampled_rows: Tensor  # [any] int64: the row of each among the tokens of the step in flight


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of one forward pass over `tokens` rows.

    Rows with logits are the scored prompt positions, in chunk order, then the last row of each
    chunk that samples, in chunk order.
    """

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    logits_indices: Tensor  # [rows with logits] int64
    rows: StepRows
    attention: AttentionPlan
    placeholders: PlaceholderTokens | None
    sampling: tuple[Sequence, ...]
    scored: tuple[Chunk, ...]  # chunks with scored positions, which come first in logits_indices


def build_batch(
    sub_batch: SubBatch,
    block_size: int,
    null_block: int,
    device: torch.device,
    sampled_rows: Mapping[Sequence, int] = NOTHING_SAMPLED,
) -> Batch:
    """Returns the batch of one sub-batch, on `device`.

    `sampled_rows` maps each sequence that the step in flight samples to its row there.
    """
    ids: list[int] = []
    logits_indices: list[int] = []
    scored: list[int] = []
    placeholders: dict[int, int] = {}
    for chunk in sub_batch.chunks:
        sequence, start = chunk.sequence, chunk.start
        if chunk.scored:
            scored += [len(ids) + position - start for position in chunk.scored]
        if start < len(sequence.tokens):
            ids += sequence.tokens[start : start + chunk.length]
        else:
            placeholders[len(ids)] = sampled_rows[sequence]
            ids.append(0)
        if chunk.samples:
            logits_indices.append(len(ids) - 1)
    logits_indices = scored + logits_indices
    lists = (ids, logits_indices, [*placeholders], [*placeholders.values()])
    moved = arrays_on_device(
        [
            *(np.array(one, dtype=np.int64) for one in lists),
            *_layout(sub_batch.chunks, block_size, null_block),
        ],
        device,
    )
    return Batch(
        ids=moved[0],
        positions=moved[4],
        logits_indices=moved[1],
        rows=_step_rows(sub_batch, logits_indices),
        attention=_plan(sub_batch.chunks, moved[5:]),
        placeholders=PlaceholderTokens(moved[2], moved[3]) if placeholders else None,
        sampling=tuple([chunk.sequence for chunk in sub_batch.chunks if chunk.samples]),
        scored=tuple([chunk for chunk in sub_batch.chunks if chunk.scored]),
    )


def _layout(
    chunks: list[Chunk], block_size: int, null_block: int
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Returns the positions of all rows, then the arrays of the attention plan."""
    begins = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    counts = np.array([chunk.length for chunk in chunks], dtype=np.int64)
    ends = begins + counts
    starts = np.zeros(len(chunks) + 1, dtype=np.int64)
    counts.cumsum(out=starts[1:])
    owners = np.arange(len(chunks)).repeat(counts)  # the chunk that each row belongs to
    positions = np.arange(starts[-1]) + (begins - starts[:-1])[owners]
    tables = _tables(chunks, -(-ends // block_size), null_block)
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size
    (partial,) = np.nonzero((ends % block_size > 0) & (ends - ends % block_size >= begins))
    return (
        positions,
        slots + positions % block_size,
        starts.astype(np.int32),
        ends.astype(np.int32),
        tables,
        tables[partial, ends[partial] // block_size].astype(np.int64),
    )


def _tables(chunks: list[Chunk], widths: Array, null_block: int) -> Array:
    """Returns the block tables, as wide as the KV after the step needs."""
    held = array("i")
    for chunk, width in zip(chunks, widths.tolist(), strict=True):
        held.extend(chunk.sequence.block_table[:width])
    tables = np.full((len(chunks), widths.max()), null_block, dtype=np.int32)
    tables[np.arange(tables.shape[1]) < widths[:, None]] = held
    return tables


def _plan(chunks: list[Chunk], tensors: list[Tensor]) -> AttentionPlan:
    slot_mapping, query_starts, lengths, block_tables, partial_blocks = tensors
    ends = [chunk.start + chunk.length for chunk in chunks]
    decodes = _leading_decodes(chunks)
    prefills = chunks[decodes:]
    starts = accumulate([chunk.length for chunk in prefills], initial=decodes)
    return AttentionPlan(
        slot_mapping=slot_mapping,
        query_starts=query_starts,
        lengths=lengths,
        block_tables=block_tables,
        longest_decode=max(ends[:decodes], default=0),
        longest_query=max(chunk.length for chunk in chunks),
        longest=max(ends),
        prefills=tuple(
            Prefill(first, chunk.length, chunk.start)
            for first, chunk in zip(starts, prefills, strict=False)
        ),
        partial_blocks=partial_blocks,
    )


def _step_rows(sub_batch: SubBatch, logits_indices: list[int]) -> StepRows:
    """Returns the dial of every row."""
    dials: dict[Dial, int] = {}
    index: list[int] = []
    for chunk in sub_batch.chunks:
        if chunk.dial is not None:
            index += [dials.setdefault(chunk.dial, len(dials))] * chunk.length
            continue
        for position in range(chunk.start, chunk.start + chunk.length):
            index.append(dials.setdefault(chunk.sequence.dial_at(position), len(dials)))
    return StepRows(tuple(dials), tuple(index), tuple(logits_indices), sub_batch.blended)


def _leading_decodes(chunks: list[Chunk]) -> int:
    """Returns how many chunks there are before the first of several tokens."""
    for index, chunk in enumerate(chunks):
        if chunk.length > 1:
            return index
    return len(chunks)
