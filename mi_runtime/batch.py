"""One step's chunks as the tensors of one flat batch.

Rows of single tokens (decodes) come first, as the scheduler orders them; then prefill chunks.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mi_runtime.attention import AttentionPlan, Prefill
from mi_runtime.planner import Part
from mi_runtime.request import Dial
from mi_runtime.rows import StepRows
from mi_runtime.scheduler import Chunk
from mi_runtime.sequence import Sequence
from mi_runtime.transfer import together_on_device


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` rows; `kept` of them have logits: those that are scored, and one a sequence that
    samples, both in chunk order."""

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    kept: Tensor  # [kept] int64, rows
    rows: StepRows
    attention: AttentionPlan
    ahead: dict[int, Sequence]  # rows whose token is still being drawn, and whose; their id is 0
    sampling: tuple[Sequence, ...]
    scored: tuple[Chunk, ...]  # their scored rows stand before all others in `kept`


def build_batch(part: Part, block_size: int, spare_block: int, device: torch.device) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    scored: list[int] = []
    ahead: dict[int, Sequence] = {}
    for chunk in part.chunks:
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
        scored += [len(ids) + position - start for position in chunk.scored]
        known = sequence.tokens[start:end]
        if not known:
            ahead[len(ids)] = sequence
        ids += known or [0]
        positions += range(start, end)
        if chunk.samples:
            kept.append(len(ids) - 1)
    kept = scored + kept
    moved = together_on_device([ids, positions, kept], torch.int64, device)
    return Batch(
        ids=moved[0],
        positions=moved[1],
        kept=moved[2],
        rows=_step_rows(part, kept),
        attention=attention_plan(part.chunks, block_size, spare_block, device),
        ahead=ahead,
        sampling=tuple(chunk.sequence for chunk in part.chunks if chunk.samples),
        scored=tuple(chunk for chunk in part.chunks if chunk.scored),
    )


def attention_plan(
    chunks: list[Chunk], block_size: int, spare_block: int, device: torch.device
) -> AttentionPlan:
    decodes = _leading_decodes(chunks)
    starts = [0, *accumulate(chunk.length for chunk in chunks)]
    lengths = [chunk.start + chunk.length for chunk in chunks]
    tables = _padded_tables(chunks, lengths, block_size, spare_block)
    own = together_on_device([starts, lengths, tables], torch.int32, device)
    wide = together_on_device(
        [_slots(chunks, block_size), _opened(chunks, block_size)], torch.int64, device
    )
    return AttentionPlan(
        slots=wide[0],
        query_starts=own[0],
        lengths=own[1],
        tables=own[2].view(len(chunks), -1),
        longest_decode=max(lengths[:decodes], default=0),
        longest_query=max(chunk.length for chunk in chunks),
        longest=max(lengths),
        prefills=tuple(
            Prefill(first, chunk.length, chunk.start)
            for first, chunk in zip(starts[decodes:], chunks[decodes:], strict=False)
        ),
        opened=wide[1],
    )


def _step_rows(part: Part, kept: list[int]) -> StepRows:
    dials: dict[Dial, int] = {}
    index: list[int] = []
    for chunk in part.chunks:
        whole = chunk.dial
        own = (
            [chunk.sequence.dial_at(chunk.start + row) for row in range(chunk.length)]
            if whole is None
            else [whole]
        )
        places = [dials.setdefault(dial, len(dials)) for dial in own]
        index += places if whole is None else places * chunk.length
    return StepRows(tuple(dials), tuple(index), tuple(kept), part.blended)


def _leading_decodes(chunks: list[Chunk]) -> int:
    for index, chunk in enumerate(chunks):
        if chunk.length > 1:
            return index
    return len(chunks)


def _padded_tables(
    chunks: list[Chunk], lengths: list[int], block_size: int, spare_block: int
) -> list[int]:
    """The blocks of every chunk's KV, none that its sequence has for later."""
    tables = [
        chunk.sequence.block_table[: -(-length // block_size)]
        for chunk, length in zip(chunks, lengths, strict=True)
    ]
    width = max(map(len, tables))
    return [block for table in tables for block in table + [spare_block] * (width - len(table))]


def _slots(chunks: list[Chunk], block_size: int) -> list[int]:
    """Where each row's KV goes."""
    return [
        chunk.sequence.block_table[position // block_size] * block_size + position % block_size
        for chunk in chunks
        for position in range(chunk.start, chunk.start + chunk.length)
    ]


def _opened(chunks: list[Chunk], block_size: int) -> list[int]:
    """Blocks that a chunk fills in part, from their first slot on."""
    opened = []
    for chunk in chunks:
        end = chunk.start + chunk.length
        if end % block_size and end - end % block_size >= chunk.start:
            opened.append(chunk.sequence.block_table[end // block_size])
    return opened
