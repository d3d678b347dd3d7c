"""One step's chunks as the tensors of one flat batch.

Rows of single tokens (decodes) come first, as the scheduler orders them; then prefill chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mi_runtime.attention import AttentionPlan, Prefill
from mi_runtime.blend import common_endpoint
from mi_runtime.scheduler import Chunk
from mi_runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` rows; `kept` of them have logits, one a sequence that samples, in chunk order."""

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    lambdas: Tensor  # [tokens] fp32
    kept: Tensor  # [kept] int64, rows
    endpoint: int | None  # the endpoint all rows are at
    attention: AttentionPlan
    sampling: tuple[Sequence, ...]


def build_batch(
    chunks: list[Chunk], block_size: int, zero_block: int, device: torch.device
) -> Batch:
    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    opened: list[int] = []
    lambdas: list[float] = []
    kept: list[int] = []
    prefills: list[Prefill] = []
    decodes = _leading_decodes(chunks)
    for index, chunk in enumerate(chunks):
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
        table = sequence.block_table
        if index >= decodes:
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
        lambdas += [sequence.request.dial.reasoning_lambda] * chunk.length
        if chunk.samples:
            kept.append(len(ids) - 1)
    return Batch(
        ids=tensor(ids),
        positions=tensor(positions),
        lambdas=torch.tensor(lambdas, dtype=torch.float32, device=device),
        kept=tensor(kept),
        endpoint=common_endpoint(lambdas),
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
