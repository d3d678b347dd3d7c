"""Paged attention against its slow twin, which sees whole sequences and has no cache."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mi_runtime.attention import LayerShape, PackedAttention, PagedAttention, attention_forward
from mi_runtime.batch import build_batch
from mi_runtime.blend import UnsupportedModel
from mi_runtime.planner import Part
from mi_runtime.request import Dial, EngineRequest
from mi_runtime.scheduler import Chunk
from mi_runtime.sequence import Sequence

CPU = torch.device("cpu")
KEY_DIM, VALUE_DIM = 8, 6
LAYERS = 2
NUM_BLOCKS = 40


@dataclass(frozen=True)
class Workload:
    """Random queries, keys and values of whole sequences, packed one after the other."""

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


def attention(work: Workload) -> PagedAttention:
    shapes = (LayerShape(work.kv_heads, KEY_DIM, VALUE_DIM, work.kv_heads * work.group),) * LAYERS
    return PagedAttention(shapes, NUM_BLOCKS, work.block_size, torch.float32, CPU)


def sequences(work: Workload, blocks: list[int]) -> list[Sequence]:
    """One of each length, with blocks taken from the end of `blocks`."""
    made = []
    for index, length in enumerate(work.lengths):
        made.append(Sequence(EngineRequest(str(index), (1,) * length, Dial(0.5))))
        made[-1].block_table = [blocks.pop() for _ in range(-(-length // work.block_size))]
    return made


def steps(work: Workload, running: list[Sequence]) -> Iterator[list[Chunk]]:
    """Random chunks until everything is computed, single tokens first."""
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
    """The packed rows that these chunks compute."""
    rows = []
    for chunk in chunks:
        first = sum(work.lengths[: int(chunk.sequence.request_id)])
        rows += range(first + chunk.start, first + chunk.start + chunk.length)
    return torch.tensor(rows)


def paged(work: Workload, over: PagedAttention, running: list[Sequence], layer: int = 1) -> Tensor:
    query, key, value, sinks = work.tensors()
    out = torch.full((len(query), work.kv_heads * work.group, VALUE_DIM), torch.nan)
    for chunks in steps(work, running):
        rows = rows_of(work, chunks)
        over.begin(
            build_batch(
                Part(chunks, blended=False), work.block_size, over.spare_block, CPU
            ).attention
        )
        own = sinks[rows] if sinks is not None and sinks.dim() == 2 else sinks
        out[rows] = over.attend(
            layer, query[rows], key[rows], value[rows], scale=0.3, window=work.window, sinks=own
        )
    return out


def packed(work: Workload) -> Tensor:
    query, key, value, sinks = work.tensors()
    twin = PackedAttention(work.lengths)
    return twin.attend(0, query, key, value, scale=0.3, window=work.window, sinks=sinks)


def poison(over: PagedAttention, work: Workload) -> None:
    """Every block is used, and left, by a sequence whose keys and values are all NaN."""
    length = NUM_BLOCKS * work.block_size
    one = Sequence(EngineRequest("poison", (1,) * length, Dial(0.5)))
    one.block_table = list(range(NUM_BLOCKS))
    plan = build_batch(
        Part([Chunk(one, 0, length)], False), work.block_size, over.spare_block, CPU
    ).attention
    key = torch.full((length, work.kv_heads, KEY_DIM), torch.nan)
    value = torch.full((length, work.kv_heads, VALUE_DIM), torch.nan)
    query = torch.zeros(length, work.kv_heads, KEY_DIM)
    for layer in range(LAYERS):
        over.begin(plan)
        over.attend(layer, query, key, value, scale=1.0, window=None, sinks=None)


def shuffled_blocks(seed: int) -> list[int]:
    return random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)


workloads = st.builds(
    Workload,
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5).map(tuple),
    block_size=st.sampled_from([1, 4, 16]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 5, 100]),
    sinks=st.sampled_from(["none", "shared", "by row"]),
    budget=st.sampled_from([1, 6, 100]),
).filter(lambda work: sum(-(-one // work.block_size) for one in work.lengths) <= NUM_BLOCKS)


@given(work=workloads)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_paged_attention_agrees_with_its_slow_twin(work: Workload) -> None:
    out = paged(work, attention(work), sequences(work, shuffled_blocks(work.seed)))
    torch.testing.assert_close(out, packed(work), atol=2e-6, rtol=1e-5)


@given(work=workloads)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_nothing_of_what_a_block_held_before_reaches_its_next_user(work: Workload) -> None:
    """A sequence that ends in the middle of its prefill leaves whatever it computed behind."""
    over = attention(work)
    poison(over, work)
    out = paged(work, over, sequences(work, shuffled_blocks(work.seed)))
    torch.testing.assert_close(out, packed(work), atol=2e-6, rtol=1e-5)


def test_layers_keep_their_keys_and_values_apart() -> None:
    work = Workload()
    over, blocks = attention(work), shuffled_blocks(0)
    for layer in range(LAYERS):
        out = paged(work, over, sequences(work, list(blocks)), layer)
        torch.testing.assert_close(out, packed(work), atol=2e-6, rtol=1e-5)


def test_a_shared_prefix_is_read_and_not_written() -> None:
    """The second sequence has the first one's blocks, as after a hit in the prefix cache."""
    work = Workload(lengths=(8, 11), budget=100)
    query, key, value, _ = work.tensors()
    key[8:16], value[8:16] = key[:8], value[:8]
    over, (first, second) = attention(work), sequences(work, shuffled_blocks(1))
    second.block_table[:2] = first.block_table
    second.computed = 8
    for chunk in (Chunk(first, 0, 8), Chunk(second, 8, 3)):
        rows = rows_of(work, [chunk])
        over.begin(build_batch(Part([chunk], False), 4, over.spare_block, CPU).attention)
        out = over.attend(
            0, query[rows], key[rows], value[rows], scale=0.3, window=None, sinks=None
        )
    twin = PackedAttention(work.lengths)
    expected = twin.attend(0, query, key, value, scale=0.3, window=None, sinks=None)
    torch.testing.assert_close(out, expected[16:], atol=2e-6, rtol=1e-5)


def test_the_slow_twin_is_attention_as_it_is_written_down() -> None:
    work = Workload(lengths=(6,), kv_heads=1, group=2, window=3, sinks="shared")
    query, key, value, sinks = work.tensors()
    assert sinks is not None
    out = packed(work)
    for row in range(6):
        for head in range(2):
            seen = slice(max(0, row - 2), row + 1)
            scores = key[seen, 0] @ query[row, head] * 0.3
            weights = torch.cat((scores, sinks[head : head + 1])).softmax(0)[:-1]
            torch.testing.assert_close(out[row, head], weights @ value[seen, 0])


class Layer(nn.Module):
    layer_idx = 1


@pytest.mark.parametrize("argument", ["softcap", "head_mask", "position_bias"])
def test_an_argument_that_would_change_the_result_is_refused_by_name(argument: str) -> None:
    x = torch.zeros(1, 2, 3, KEY_DIM)
    twin = PackedAttention((3,))
    with pytest.raises(UnsupportedModel, match=argument):
        attention_forward(
            Layer(), x, x, x, None, attention_context=twin, scaling=1.0, **{argument: 30.0}
        )


def test_a_mask_of_the_models_own_is_refused() -> None:
    x = torch.zeros(1, 2, 3, KEY_DIM)
    twin = PackedAttention((3,))
    with pytest.raises(UnsupportedModel, match="mask"):
        attention_forward(Layer(), x, x, x, torch.ones(3, 3), attention_context=twin, scaling=1.0)


def test_the_slow_twin_records_the_shape_of_every_layer() -> None:
    work, twin = Workload(lengths=(3,), sinks="shared"), PackedAttention((3,))
    query, key, value, sinks = work.tensors()
    twin.attend(4, query, key, value, scale=1.0, window=None, sinks=None)
    twin.attend(5, query, key, value, scale=1.0, window=7, sinks=sinks)
    plain = LayerShape(kv_heads=2, key_dim=KEY_DIM, value_dim=VALUE_DIM, heads=4)
    assert twin.shapes == {4: plain, 5: replace(plain, window=7, sinks=True)}
