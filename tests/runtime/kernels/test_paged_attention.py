"""The Triton kernels of paged attention, interpreted, agree with the reference.

Interpreted, a tile is 16 tokens by 16 rows, so that lengths of some tens cross every boundary.
`tests/bench/test_kernel_code.py` tests what compiles for a GPU.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.plan import AttentionPlan, LayerShape
from mi_runtime.attention.reference import ReferenceAttention
from mi_runtime.request import Dial, EngineRequest
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.sequence import Sequence
from tests.runtime.paged import (
    Workload,
    attention,
    attention_plan,
    by_paged_attention,
    by_reference,
    sequences,
    shuffled_blocks,
)

pytest.importorskip("triton")
kernels = pytest.importorskip("mi_runtime.kernels.paged_attention")
triton_backend = pytest.importorskip("mi_runtime.attention.triton_backend")

NUM_BLOCKS = 80


@dataclass(frozen=True)
class Case:
    """Chunks over a cache, each as (tokens before it, its tokens); decodes first."""

    chunks: tuple[tuple[int, int], ...] = ((39, 1), (0, 1), (15, 1), (16, 1), (21, 19), (0, 3))
    block_size: int = 4
    kv_heads: int = 2
    group: int = 4
    key_dim: int = 64
    value_dim: int = 64
    window: int | None = None
    sinks: str = "none"  # or "heads", "shared", "rows"
    splits: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return sum(length for _, length in self.chunks)

    @property
    def scale(self) -> float:
        return float(self.key_dim**-0.5)

    def random(self, *size: int, seed: int = 0) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def plan(self) -> AttentionPlan:
        blocks = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        chunks = []
        for start, length in self.chunks:
            one = Sequence(EngineRequest("one", (1,) * (start + length), Dial(0.5)))
            one.block_table = [blocks.pop() for _ in range(-(-len(one) // self.block_size))]
            chunks.append(Chunk(one, start, length))
        return attention_plan(chunks, self.block_size, NUM_BLOCKS)

    def caches(self, unwritten: float) -> tuple[Tensor, Tensor]:
        """Returns keys and values, random for every token and `unwritten` everywhere else."""
        return self._cache(self.key_dim, unwritten, 1), self._cache(self.value_dim, unwritten, 2)

    def _cache(self, dim: int, unwritten: float, seed: int) -> Tensor:
        plan = self.plan()
        cache = torch.full((NUM_BLOCKS + 1, self.block_size, self.kv_heads, dim), unwritten)
        for table, length in zip(plan.block_tables, plan.lengths.tolist(), strict=True):
            position = torch.arange(length)
            block, offset = table[position // self.block_size], position % self.block_size
            seed += 2
            cache[block, offset] = self.random(length, self.kv_heads, dim, seed=seed).float()
        return cache.to(self.dtype)

    def sink_values(self) -> Tensor | None:
        heads = self.kv_heads * self.group
        sizes = {"heads": (heads,), "shared": (1, heads), "rows": (self.rows, heads)}
        return None if self.sinks == "none" else self.random(*sizes[self.sinks])

    def query(self) -> Tensor:
        return self.random(self.rows, self.kv_heads * self.group, self.key_dim)

    def expected(self) -> Tensor:
        keys, values = (cache.float() for cache in self.caches(0.0))
        sinks = self.sink_values()
        return ReferenceAttention().attend(
            self.plan(),
            self.query().float(),
            keys,
            values,
            scale=self.scale,
            window=self.window,
            sinks=sinks if sinks is None else sinks.float(),
        )

    def computed(self) -> Tensor:
        """Returns the kernels' output over a cache that is NaN where nothing was written."""
        plan = self.plan()
        keys, values = self.caches(torch.nan)
        out: Tensor = kernels.paged_attention(
            *(self.query(), keys, values, plan.block_tables, plan.lengths, plan.query_starts),
            *(self.sink_values(), self.scale, self.window, plan.decodes),
            *(plan.longest_decode, plan.longest, self.splits),
        )
        return out

    def check(self, tolerance: float = 3e-6) -> None:
        torch.testing.assert_close(
            self.computed().float(), self.expected(), atol=tolerance, rtol=tolerance
        )


LONG = ((39, 1), (0, 1), (69, 1), (126, 1))  # decodes; four splits have two to eight tiles


@pytest.mark.parametrize(
    ("group", "window"), [(1, None), (1, 18), (4, None), (4, 1), (7, None), (7, 18)]
)
def test_prefill_chunks_and_decodes_agree_with_the_reference(
    group: int, window: int | None
) -> None:
    Case(group=group, window=window).check()


@pytest.mark.parametrize("dims", [(80, 80), (128, 128), (256, 256), (96, 20), (24, 112)])
def test_heads_of_every_size_agree_with_the_reference(dims: tuple[int, int]) -> None:
    chunks = ((20, 1), (17, 18))
    Case(chunks, key_dim=dims[0], value_dim=dims[1], kv_heads=1, group=2).check()


@pytest.mark.parametrize(("sinks", "window"), [("heads", None), ("shared", 18), ("rows", 18)])
def test_sinks_of_every_shape_agree_with_the_reference(sinks: str, window: int | None) -> None:
    Case(((39, 1), (21, 9), (0, 3)), sinks=sinks, window=window, splits=4).check()


@pytest.mark.parametrize(("splits", "window"), [(1, None), (2, 50), (4, None), (8, None), (8, 50)])
def test_decodes_computed_in_splits_agree_with_the_reference(
    splits: int, window: int | None
) -> None:
    Case(LONG, splits=splits, window=window, sinks="heads").check()


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("window", [None, 20])
def test_prefill_chunks_computed_in_splits_agree_with_the_reference(
    splits: int, window: int | None
) -> None:
    """With a window, a query sees no token of a part that another query of its tile sees."""
    chunks = ((50, 1), (58, 9), (0, 21))
    Case(chunks, splits=splits, window=window, sinks="rows", kv_heads=1).check()


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
def test_blocks_of_any_size_agree_with_the_reference(block_size: int) -> None:
    """A tile may be part of a block, or contain several."""
    Case(((17, 1), (21, 19)), block_size=block_size).check()


def test_half_precision_agrees_with_the_reference_within_its_rounding() -> None:
    """Tested in float16, as the interpreter reads the bits of bfloat16 as integers."""
    chunks = ((39, 1), (21, 9), (0, 3))
    Case(chunks, dtype=torch.float16, splits=2, sinks="rows").check(tolerance=4e-3)


def test_every_tile_finds_its_chunk_among_many_short_ones() -> None:
    """Each chunk has at least one tile, and some chunks end with their last tile."""
    chunks = tuple(enumerate([2, 4, 8, 3, 1, 5, 4, 2, 7]))
    Case(chunks, kv_heads=1).check()


def test_a_kv_head_of_more_query_heads_than_a_tile_has_rows_agrees() -> None:
    Case(((17, 1), (3, 5)), kv_heads=1, group=20).check()


def test_rows_that_pad_a_batch_change_nothing() -> None:
    """As in a CUDA graph, a row of padding is one token in the null block."""
    case = Case(LONG, splits=2)
    plan, padding = case.plan(), 3
    spare = torch.full((padding, plan.block_tables.shape[1]), NUM_BLOCKS, dtype=torch.int32)
    query = torch.cat((case.query(), case.random(padding, *case.query().shape[1:])))
    keys, values = case.caches(torch.nan)
    keys[NUM_BLOCKS], values[NUM_BLOCKS] = 1.0, 1.0  # what padding wrote
    out = kernels.paged_attention(
        *(query, keys, values),
        torch.cat((plan.block_tables, spare)),
        torch.cat((plan.lengths, torch.ones(padding, dtype=torch.int32))),
        torch.arange(len(query) + 1, dtype=torch.int32),
        *(None, case.scale, None, len(query), 200, 200, case.splits),
    )
    torch.testing.assert_close(out[: case.rows], case.expected(), atol=3e-6, rtol=3e-6)


def test_queries_may_be_strided() -> None:
    """Models pass them as views, heads before tokens."""
    case = Case()
    plan, query = case.plan(), case.query()
    keys, values = case.caches(0.0)
    across = query.transpose(0, 1).contiguous().transpose(0, 1)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (across, apart):
        out = kernels.paged_attention(
            *(view, keys, values, plan.block_tables, plan.lengths, plan.query_starts),
            *(None, case.scale, None, plan.decodes, 1, 1),
        )
        torch.testing.assert_close(out, case.expected(), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("across", [False, True])
def test_kv_is_written_to_its_slots_and_nowhere_else(across: bool) -> None:
    keys, values = torch.zeros(5, 4, 3, 24), torch.zeros(5, 4, 3, 20)
    slots = torch.tensor([7, 0, 19, 18])
    key, value = torch.randn(4, 3, 24), torch.randn(4, 3, 20)
    expected = [cache.clone() for cache in (keys, values)]
    for cache, new in zip(expected, (key, value), strict=True):
        cache.flatten(0, 1)[slots] = new
    if across:  # heads before tokens
        key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
    kernels.write_kv(keys, values, key, value, slots)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_a_cache_of_more_than_two_to_the_31_numbers_is_addressed_correctly() -> None:
    """Its memory is reserved, not used: pages that nobody writes take none."""
    block_size, dim = 16, 256
    blocks = 2**31 // (block_size * dim) + 1
    keys = torch.empty(blocks + 1, block_size, 1, dim, dtype=torch.float16)
    values = torch.empty_like(keys)
    one = Sequence(EngineRequest("one", (1,) * 20, Dial(0.5)))
    one.block_table = [blocks, 0]
    plan = attention_plan([Chunk(one, 0, 20)], block_size, 1)
    key, value, query = (torch.randn(20, heads, dim).half() for heads in (1, 1, 2))
    backend = triton_backend.TritonAttention()
    backend.write(plan, keys, values, key, value)
    out = backend.attend(plan, query, keys, values, scale=0.1, window=None, sinks=None)
    assert torch.equal(keys[blocks], key[:16])
    small = replace(plan, block_tables=torch.tensor([[1, 0]], dtype=torch.int32))
    ends = [cache[[0, blocks]].float() for cache in (keys, values)]
    expected = ReferenceAttention().attend(
        small, query.float(), *ends, scale=0.1, window=None, sinks=None
    )
    torch.testing.assert_close(out.float(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("seed", range(4))
def test_random_workloads_over_reused_blocks_agree_with_the_reference(seed: int) -> None:
    chance = random.Random(seed)
    work = Workload(
        seed=seed,
        lengths=tuple(chance.randint(1, 40) for _ in range(3)),
        block_size=chance.choice([4, 16]),
        group=chance.choice([1, 3]),
        window=chance.choice([None, 9]),
        sinks=chance.choice(["none", "shared", "by row"]),
        budget=24,
    )
    over = attention(work, triton_backend.TritonAttention())
    for cache in (*over._keys, *over._values):
        cache.fill_(torch.nan)
    out = by_paged_attention(work, over, sequences(work, shuffled_blocks(seed)))
    torch.testing.assert_close(out, by_reference(work), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("programs", "longest", "splits"),
    [
        (8, 100_000, 64),  # at most
        (64, 100_000, 16),
        (256, 100_000, 4),
        (256, 1024, 4),
        (512, 1024, 2),
        (2048, 100_000, 1),
        (8, 1024, 8),  # of no fewer than 128 tokens
        (8, 100, 1),
        (0, 0, 1),
    ],
)
def test_work_is_split_until_it_fills_the_device(programs: int, longest: int, splits: int) -> None:
    assert kernels.number_of_splits(programs, 6 * 132, longest) == splits


@pytest.mark.parametrize("chunks", [((300, 1), (0, 1)), ((290, 10),)])
@pytest.mark.parametrize(("window", "divided"), [(None, True), (20, False)])
def test_work_that_a_window_shortens_is_not_split(
    chunks: tuple[tuple[int, int], ...],
    window: int | None,
    divided: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added = []
    add_parts = kernels.add_parts_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            added.append(grid)
            return add_parts[grid]

    monkeypatch.setattr(kernels, "processors", lambda device: 16)
    monkeypatch.setattr(kernels, "add_parts_kernel", Counted())
    Case(chunks, kv_heads=1, window=window, splits=0).check()
    assert bool(added) == divided


def test_the_operators_have_a_correct_schema_and_fake_implementation() -> None:
    case = Case(((20, 1), (3, 5)), sinks="rows", splits=2)
    plan, (keys, values) = case.plan(), case.caches(0.0)
    tests = ("test_schema", "test_faketensor")
    arguments = (case.query(), keys, values, plan.block_tables, plan.lengths, plan.query_starts)
    torch.library.opcheck(
        kernels.paged_attention,
        (*arguments, case.sink_values(), case.scale, 7, plan.decodes, 24, 24, 2),
        test_utils=tests,
    )
    new = case.random(6, 2, 64)
    torch.library.opcheck(
        kernels.write_kv, (keys, values, new, new.clone(), plan.slot_mapping), test_utils=tests
    )


def test_a_layer_traces_with_fake_tensors_of_a_gpu() -> None:
    """Nothing in it reads a value from the device."""
    plan = Case().plan()
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.device("cuda")
        tensors = ("slot_mapping", "query_starts", "lengths", "block_tables", "partial_blocks")
        fake = replace(
            plan,
            **{name: torch.empty_like(getattr(plan, name), device=cuda) for name in tensors},
        )
        backend = triton_backend.TritonAttention()
        over = PagedAttention(
            (LayerShape(2, 64, 32, 8),), NUM_BLOCKS, 4, torch.bfloat16, cuda, backend
        )
        over.begin(fake)
        query, key, value = (
            torch.empty(len(plan.slot_mapping), heads, dim, dtype=torch.bfloat16, device=cuda)
            for heads, dim in ((8, 64), (2, 64), (2, 32))
        )
        out = over.attend(0, query, key, value, scale=0.1, window=9, sinks=None)
    assert (out.shape, out.dtype, out.device.type) == (
        (len(plan.slot_mapping), 8, 32),
        torch.bfloat16,
        "cuda",
    )
