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
from mi_runtime.transfer import on_device


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


def build_batch(part: Part, block_size: int, zero_block: int, device: torch.device) -> Batch:
    def tensor(values: list[int]) -> Tensor:
        return on_device(values, torch.int64, device)

    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    opened: list[int] = []
    kept: list[int] = []
    scored: list[int] = []
    ahead: dict[int, Sequence] = {}
    prefills: list[Prefill] = []
    decodes = _leading_decodes(part.chunks)
    for order, chunk in enumerate(part.chunks):
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
        table = sequence.block_table
        if order >= decodes:
            blocks = tensor(table[: -(-end // block_size)])
            prefills.append(Prefill(len(ids), chunk.length, start, blocks))
        scored += [len(ids) + position - start for position in chunk.scored]
        known = sequence.tokens[start:end]
        if not known:
            ahead[len(ids)] = sequence
        ids += known or [0]
        positions += range(start, end)
        slots += [
            table[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        ]
        if end % block_size and end - end % block_size >= start:
            opened.append(table[end // block_size])
        if chunk.samples:
            kept.append(len(ids) - 1)
    kept = scored + kept
    singles = part.chunks[:decodes]
    tables = _padded_tables(singles, block_size, zero_block)
    return Batch(
        ids=tensor(ids),
        positions=tensor(positions),
        kept=tensor(kept),
        rows=_step_rows(part, kept),
        attention=AttentionPlan(
            slots=tensor(slots),
            opened=tensor(opened),
            decodes=decodes,
            tables=tensor(tables).view(decodes, -1) if decodes else tensor([]),
            lengths=tensor([chunk.start + 1 for chunk in singles]),
            prefills=tuple(prefills),
        ),
        ahead=ahead,
        sampling=tuple(chunk.sequence for chunk in part.chunks if chunk.samples),
        scored=tuple(chunk for chunk in part.chunks if chunk.scored),
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


def _padded_tables(chunks: list[Chunk], block_size: int, zero_block: int) -> list[int]:
    """The blocks of every decode's KV, none that it has for later."""
    tables = [chunk.sequence.block_table[: chunk.start // block_size + 1] for chunk in chunks]
    width = max(map(len, tables), default=0)
    return [block for table in tables for block in table + [zero_block] * (width - len(table))]
