"""One step's chunks as the tensors of one flat batch.

Rows of single tokens (decodes) come first, as the scheduler orders them; then prefill chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mi_runtime.attention import AttentionPlan, Prefill
from mi_runtime.planner import Part
from mi_runtime.request import Dial
from mi_runtime.rows import StepRows
from mi_runtime.scheduler import Chunk
from mi_runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` rows; `kept` of them have logits, one a sequence that samples, in chunk order."""

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    kept: Tensor  # [kept] int64, rows
    rows: StepRows
    attention: AttentionPlan
    sampling: tuple[Sequence, ...]


def build_batch(part: Part, block_size: int, zero_block: int, device: torch.device) -> Batch:
    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    dials: dict[Dial, int] = {}
    index: list[int] = []
    opened: list[int] = []
    kept: list[int] = []
    prefills: list[Prefill] = []
    chunks = part.chunks
    decodes = _leading_decodes(chunks)
    for order, chunk in enumerate(chunks):
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
        table = sequence.block_table
        if order >= decodes:
            blocks = tensor(table[: -(-end // block_size)])
            prefills.append(Prefill(len(ids), chunk.length, start, blocks))
        ids += sequence.tokens[start:end]
        positions += range(start, end)
        slots += [
            table[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        ]
        if end % block_size and end - end % block_size >= start:
            opened.append(table[end // block_size])
        if chunk.dial is not None:
            index += [dials.setdefault(chunk.dial, len(dials))] * chunk.length
        else:
            index += [
                dials.setdefault(sequence.dial_at(position), len(dials))
                for position in range(start, end)
            ]
        if chunk.samples:
            kept.append(len(ids) - 1)
    return Batch(
        ids=tensor(ids),
        positions=tensor(positions),
        kept=tensor(kept),
        rows=StepRows(tuple(dials), tuple(index), tuple(kept), part.blended),
        attention=AttentionPlan(
            slots=tensor(slots),
            opened=tensor(opened),
            decodes=decodes,
            tables=tensor(_padded_tables(chunks[:decodes], block_size, zero_block)).view(
                decodes, -1
            ),
            lengths=tensor([chunk.start + 1 for chunk in chunks[:decodes]]),
            prefills=tuple(prefills),
        )
        if decodes
        else AttentionPlan(
            tensor(slots), tensor(opened), 0, tensor([]), tensor([]), tuple(prefills)
        ),
        sampling=tuple(chunk.sequence for chunk in chunks if chunk.samples),
    )


def _leading_decodes(chunks: list[Chunk]) -> int:
    for index, chunk in enumerate(chunks):
        if chunk.length > 1:
            return index
    return len(chunks)


def _padded_tables(chunks: list[Chunk], block_size: int, zero_block: int) -> list[int]:
    """The blocks of every decode's KV, none that it has for later."""
    tables = [chunk.sequence.block_table[: chunk.start // block_size + 1] for chunk in chunks]
    width = max(map(len, tables))
    return [block for table in tables for block in table + [zero_block] * (width - len(table))]
