"""Blended weights: what is built is right, what is in use stays, and the bytes are counted."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mi_runtime.blend import BLEND_ROWS, PairExperts, PairMatrix, lerp_rounded
from mi_runtime.blend_cache import BlendCache, Key
from mi_runtime.request import Dial
from mi_runtime.rows import BlendGroups, StepRows, Way

VALUES = (0.01, 0.25, 0.3, 0.5, 0.77, 0.99)
HALVES = (torch.bfloat16, torch.float16)


class Source:
    """A pair of tensors whose blend has `nbytes` bytes, and which counts its blends."""

    def __init__(self, nbytes: int = 8) -> None:
        self.nbytes = nbytes
        self.blends = 0

    def blend(self, value: float) -> Tensor:
        self.blends += 1
        return torch.full((self.nbytes,), round(value * 100), dtype=torch.uint8)


def fill(cache: BlendCache, key: Key, *sources: Source) -> list[Tensor]:
    """A step that uses one entry."""
    cache.begin_step()
    blend = cache.use(key)
    return [blend.get(source) for source in sources]


def random_pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    low, high = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return low, high


# --- What a blend is ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [5, BLEND_ROWS, BLEND_ROWS + 3])
def test_a_blend_is_the_fp32_lerp_rounded_once(rows: int, dtype: torch.dtype, value: float) -> None:
    low, high = random_pair(rows, 6, dtype=dtype)
    expected = torch.lerp(low.float(), high.float(), value).to(dtype)
    blend = PairMatrix(low, high).blend(value)
    assert blend.dtype is dtype
    assert torch.equal(blend, expected)


@pytest.mark.parametrize("value", VALUES)
def test_in_fp32_it_is_the_exact_blend_up_to_a_rounding(value: float) -> None:
    low, high = random_pair(64, 32)
    exact = (1 - value) * low.double() + value * high.double()
    assert (PairMatrix(low, high).blend(value) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_it_is_exact_at_both_endpoints(dtype: torch.dtype) -> None:
    pair = random_pair(64, 32, dtype=dtype)
    for value in (0.0, 1.0):
        assert torch.equal(lerp_rounded(*pair, value), pair[int(value)])
        assert torch.equal(PairMatrix(*pair).blend(value), pair[int(value)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_experts_are_blended_one_by_one_to_the_same_values(
    dtype: torch.dtype, transposed: bool
) -> None:
    pair = random_pair(3, 4, 6, dtype=dtype)
    experts = PairExperts(pair, None, transposed)
    low, high = (side.mT if transposed else side for side in pair)  # [experts, out, in]
    for value in (0.0, *VALUES, 1.0):
        expected = torch.lerp(low.float(), high.float(), value).to(dtype)
        assert torch.equal(experts.blend(value), expected)


def test_a_blend_holds_only_its_own_bytes() -> None:
    """A view of the pair would keep both endpoints' bytes and not be contiguous."""
    for dtype in (torch.float32, torch.bfloat16):
        blend = PairMatrix(*random_pair(8, 6, dtype=dtype)).blend(0.5)
        assert blend.is_contiguous()
        assert blend.untyped_storage().nbytes() == blend.nbytes


# --- Stories ------------------------------------------------------------------------------------


def test_a_tensor_is_built_at_its_first_use_and_then_kept() -> None:
    cache, first, second = BlendCache(100), Source(8), Source(4)
    cache.begin_step()
    blend = cache.use(("0.attn", 0.5))
    assert (cache.nbytes, first.blends) == (0, 0)
    assert blend.get(first) is blend.get(first)
    assert (cache.nbytes, first.blends, second.blends) == (8, 1, 0)
    blend.get(second)
    assert (cache.nbytes, blend.nbytes) == (12, 12)
    assert fill(cache, ("0.attn", 0.5), first)[0] is blend.get(first)
    assert (cache.builds, cache.hits, first.blends) == (1, 1, 1)


def test_one_λ_and_one_group_are_not_another() -> None:
    cache, source = BlendCache(100), Source()
    keys = [("0.attn", 0.5), ("0.attn", 0.51), ("0.mlp", 0.5)]
    tensors = [fill(cache, key, source)[0] for key in keys]
    assert len({id(tensor) for tensor in tensors}) == cache.builds == 3
    assert [tensor[0] for tensor in tensors] == [50, 51, 50]


def test_the_least_recently_used_goes_first() -> None:
    cache = BlendCache(24)
    keys: list[Key] = [("head", 0.1), ("head", 0.2), ("head", 0.3)]
    for key in keys:
        fill(cache, key, Source())
    fill(cache, keys[0])
    fill(cache, ("head", 0.4), Source())
    assert [key in cache for key in keys] == [True, False, True]
    assert (cache.nbytes, cache.evictions) == (24, 1)


def test_what_the_step_uses_stays_whatever_the_budget() -> None:
    cache, source = BlendCache(0), Source()
    cache.begin_step()
    blends = [cache.use((group, 0.5)) for group in ("0.attn", "0.mlp")]
    tensors = [blend.get(source) for blend in blends]
    assert [blend.get(source) for blend in blends] == tensors
    assert (cache.nbytes, cache.evictions, source.blends) == (16, 0, 2)
    fill(cache, ("head", 0.5), source)
    assert (cache.nbytes, cache.evictions) == (8, 2)
    cache.check_integrity()


def test_what_was_evicted_is_built_again() -> None:
    cache, source = BlendCache(8), Source()
    for value in (0.1, 0.2, 0.1):
        assert fill(cache, ("head", value), source)[0][0] == round(value * 100)
    assert (cache.builds, cache.hits, cache.evictions, source.blends) == (3, 0, 2, 3)


def test_missing_counts_the_entries_that_would_have_to_be_built() -> None:
    cache = BlendCache(100)
    fill(cache, ("head", 0.1), Source())
    assert cache.missing([("head", 0.1), ("head", 0.2), ("0.mlp", 0.1)]) == 2
    assert (cache.builds, cache.hits) == (1, 0)


def test_a_cold_group_is_built_and_never_an_endpoint() -> None:
    groups = BlendGroups(1, torch.device("cpu"), BlendCache(0))
    pair = PairMatrix(*random_pair(8, 6))
    groups.begin(StepRows((Dial(0.3),), (0, 0), (1,), blended=True))
    rows = groups.slot("0.attn", kept=False).now
    assert rows.way is Way.BLENDED
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pair.product(x, rows), x @ pair.blend(0.3).T)
    for endpoint in pair.endpoints:
        assert (pair.product(x, rows) - x @ endpoint.T).abs().max() > 0.1


# --- Random steps -------------------------------------------------------------------------------

KEYS = st.tuples(st.sampled_from(("embed", "0.attn", "0.mlp", "head")), st.sampled_from(VALUES))
STEPS = st.lists(
    st.lists(st.tuples(KEYS, st.sets(st.integers(0, 3))), min_size=1, max_size=6), max_size=30
)


class SlowCache:
    """The slow twin: entries in order of use, each with the sizes of its tensors."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: OrderedDict[Key, dict[int, int]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(sum(sizes.values()) for sizes in self.entries.values())

    def use(self, key: Key) -> None:
        self.entries.setdefault(key, {})
        self.entries.move_to_end(key)

    def build(self, key: Key, source: int, size: int, in_use: set[Key]) -> None:
        if source in self.entries[key]:
            return
        self.entries[key][source] = size
        self.evict(in_use)

    def evict(self, in_use: set[Key]) -> None:
        for old in [one for one in self.entries if one not in in_use]:
            if self.nbytes > self.budget:
                del self.entries[old]


@given(steps=STEPS, budget=st.integers(0, 120))
def test_random_steps_keep_every_invariant(
    steps: list[list[tuple[Key, set[int]]]], budget: int
) -> None:
    sources = [Source(size) for size in (0, 3, 8, 20)]
    cache, slow = BlendCache(budget), SlowCache(budget)
    uses, most = 0, budget  # `most`: what one step uses may exceed the budget, nothing else
    for step in steps:
        cache.begin_step()
        slow.evict(in_use=set())
        blends = {}
        for key, _ in step:
            blends[key] = cache.use(key)
            slow.use(key)
        built = {}
        for key, wanted in step:
            for index in wanted:
                built[key, index] = blends[key].get(sources[index])
                slow.build(key, index, sources[index].nbytes, set(blends))
                cache.check_integrity()
        uses += len(step)
        for (key, index), tensor in built.items():  # nothing in use was evicted and built again
            assert blends[key].get(sources[index]) is tensor
            assert (tensor == round(key[1] * 100)).all()
        assert all(key in cache for key in blends)
        assert cache.nbytes == slow.nbytes
        most = max(most, sum(blend.nbytes for blend in blends.values()))
        assert cache.nbytes <= most
        assert cache.missing(slow.entries) == 0
        assert cache.builds + cache.hits == uses
        assert cache.builds - cache.evictions == len(slow.entries)
