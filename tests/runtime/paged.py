"""Random workloads for paged attention, computed by it and by its reference."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.plan import AttentionBackend, AttentionPlan, LayerShape
from mi_runtime.attention.reference import PackedAttention
from mi_runtime.execution.batch import build_batch
from mi_runtime.request import Dial, EngineRequest
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch
from mi_runtime.scheduling.sequence import Sequence

CPU = torch.device("cpu")
KEY_DIM, VALUE_DIM = 8, 6
LAYERS = 2
NUM_BLOCKS = 40


@dataclass(frozen=True)
class Workload:
    """Random queries, keys and values of complete sequences, packed one after the other."""

    seed: int = 0
    lengths: tuple[int, ...] = (5, 17, 1, 12)
    block_size: int = 4
    kv_heads: int = 2
    group: int = 2  # query heads a KV head
    window: int | None = None
    sinks: str = "none"  # or "shared", or "by row"
    budget: int = 9  # tokens a step

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        rows, heads = sum(self.lengths), self.kv_heads * self.group
        query = torch.randn(rows, heads, KEY_DIM, generator=generator)
        key = torch.randn(rows, self.kv_heads, KEY_DIM, generator=generator)
        value = torch.randn(rows, self.kv_heads, VALUE_DIM, generator=generator)
        sinks = {"none": None, "shared": (heads,), "by row": (rows, heads)}[self.sinks]
        return query, key, value, sinks and torch.randn(sinks, generator=generator)


def attention(work: Workload, backend: AttentionBackend | None = None) -> PagedAttention:
    shapes = (LayerShape(work.kv_heads, KEY_DIM, VALUE_DIM, work.kv_heads * work.group),) * LAYERS
    return PagedAttention(shapes, NUM_BLOCKS, work.block_size, torch.float32, CPU, backend)


def sequences(work: Workload, blocks: list[int]) -> list[Sequence]:
    """Returns a sequence of each length, with blocks taken from the end of `blocks`."""
    made = []
    for index, length in enumerate(work.lengths):
        made.append(Sequence(EngineRequest(str(index), (1,) * length, Dial(0.5))))
        made[-1].block_table = [blocks.pop() for _ in range(-(-length // work.block_size))]
    return made


def steps(work: Workload, running: list[Sequence]) -> Iterator[list[Chunk]]:
    """Yields random chunks until everything is computed, single tokens first."""
    chance = random.Random(work.seed)
    while unfinished := [one for one in running if one.remaining]:
        chosen = chance.sample(unfinished, chance.randint(1, len(unfinished)))
        chunks = [
            Chunk(one, one.computed, chance.randint(1, min(one.remaining, work.budget)))
            for one in chosen
        ]
        yield sorted(chunks, key=lambda chunk: chunk.length > 1)
        for chunk in chunks:
            chunk.sequence.computed += chunk.length


def rows_of(work: Workload, chunks: list[Chunk]) -> Tensor:
    """Returns the packed rows that these chunks compute."""
    rows = []
    for chunk in chunks:
        first = sum(work.lengths[: int(chunk.sequence.request_id)])
        rows += range(first + chunk.start, first + chunk.start + chunk.length)
    return torch.tensor(rows)


def attention_plan(chunks: list[Chunk], block_size: int, null_block: int) -> AttentionPlan:
    """Returns the attention plan of a batch of these chunks."""
    return build_batch(SubBatch(chunks, blended=False), block_size, null_block, CPU).attention


def by_paged_attention(
    work: Workload, over: PagedAttention, running: list[Sequence], layer: int = 1
) -> Tensor:
    """Returns the output of paged attention for every row, computed in random steps."""
    query, key, value, sinks = work.tensors()
    out = torch.full((len(query), work.kv_heads * work.group, VALUE_DIM), torch.nan)
    for chunks in steps(work, running):
        rows = rows_of(work, chunks)
        over.begin(attention_plan(chunks, work.block_size, over.null_block))
        own = sinks[rows] if sinks is not None and sinks.dim() == 2 else sinks
        out[rows] = over.attend(
            layer, query[rows], key[rows], value[rows], scale=0.3, window=work.window, sinks=own
        )
    return out


def by_reference(work: Workload) -> Tensor:
    """Returns the same output by attention over complete sequences, without a cache."""
    query, key, value, sinks = work.tensors()
    reference = PackedAttention(work.lengths)
    return reference.attend(0, query, key, value, scale=0.3, window=work.window, sinks=sinks)


def poison(over: PagedAttention, work: Workload) -> None:
    """Fills every block with NaN, as a sequence that overflowed leaves it."""
    length = NUM_BLOCKS * work.block_size
    one = Sequence(EngineRequest("poison", (1,) * length, Dial(0.5)))
    one.block_table = list(range(NUM_BLOCKS))
    plan = attention_plan([Chunk(one, 0, length)], work.block_size, over.null_block)
    key = torch.full((length, work.kv_heads, KEY_DIM), torch.nan)
    value = torch.full((length, work.kv_heads, VALUE_DIM), torch.nan)
    query = torch.zeros(length, work.kv_heads, KEY_DIM)
    for layer in range(LAYERS):
        over.begin(plan)
        over.attend(layer, query, key, value, scale=1.0, window=None, sinks=None)


def shuffled_blocks(seed: int) -> list[int]:
    return random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
