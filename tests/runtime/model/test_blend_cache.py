"""Blended weights are the exact blend rounded once, and each group keeps its last few λ."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mi_runtime.model.blend_cache import BlendCache, Key
from mi_runtime.model.row_lambdas import BlendGroups, StepRows, Way
from mi_runtime.model.weights import PairExperts, PairMatrix, VocabularyPair
from mi_runtime.request import Dial

VALUES = (0.01, 0.25, 0.3, 0.5, 0.77, 0.99)
HALVES = (torch.bfloat16, torch.float16)


class Source:
    """Stands for a pair of tensors whose blend has `nbytes` bytes, and counts its blends."""

    name = ""

    def __init__(self, nbytes: int = 8) -> None:
        self.nbytes = nbytes
        self.blends = 0

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        self.blends += 1
        room = torch.empty(self.nbytes, dtype=torch.uint8) if out is None else out
        return room.fill_(round(value * 100))


def fill(cache: BlendCache, key: Key, *sources: Source) -> list[Tensor]:
    """Uses one entry as a forward does, and returns its tensors."""
    blend = cache.use(key)
    return [blend.get(source) for source in sources]


def random_pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    low, high = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return low, high


# --- The values and the layout of a blend -------------------------------------------------------


def rounded_once(low: Tensor, high: Tensor, value: float) -> Tensor:
    """Returns the reference: the blend of two tensors, computed in fp32."""
    return torch.lerp(low.float(), high.float(), value).to(low.dtype)


def random_bits(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns two tensors of random bits, with subnormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, *shape), generator=generator)
    low, high = bits.to(torch.int16).view(dtype)
    return low, high


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    """Asserts that two tensors have the same bits, where any NaN equals any other."""
    assert one.dtype is other.dtype
    assert torch.equal(one.isnan(), other.isnan())
    bits = (tensor.nan_to_num(0).view(torch.int16) for tensor in (one, other))
    assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("numbers", [random_pair, random_bits])
def test_a_blend_is_the_fp32_lerp_rounded_once(
    numbers: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    pair = numbers(61, 83, dtype=dtype)
    strided, separate = PairMatrix(*pair), VocabularyPair(*pair)
    for step in range(101):
        expected = rounded_once(*pair, step / 100)
        assert_same_bits(strided.blend(step / 100), expected)
        assert_same_bits(separate.blend(step / 100), expected)


@pytest.mark.parametrize("value", VALUES)
def test_an_fp32_blend_matches_float64(value: float) -> None:
    low, high = random_pair(64, 32)
    exact = (1 - value) * low.double() + value * high.double()
    assert (PairMatrix(low, high).blend(value) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_blend_at_λ_0_or_1_equals_the_endpoint(dtype: torch.dtype) -> None:
    pair = random_pair(64, 32, dtype=dtype)
    for value in (0.0, 1.0):
        for source in (PairMatrix(*pair), VocabularyPair(*pair)):
            assert torch.equal(source.blend(value), pair[int(value)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_blend_of_experts_has_the_values_and_the_layout_of_its_endpoints(
    dtype: torch.dtype, transposed: bool
) -> None:
    """The layout is the same so that one compiled kernel can read both."""
    pair = random_pair(3, 14, 26, dtype=dtype)
    experts = PairExperts(pair, None, transposed)
    low, high = (side.mT if transposed else side for side in pair)  # [experts, out, in]
    for value in (0.0, *VALUES, 1.0):
        blend = experts.blend(value)
        assert_same_bits(blend, rounded_once(low, high, value))
        assert blend.stride() == low.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blend_can_be_written_into_the_memory_of_another(dtype: torch.dtype) -> None:
    for source in (
        PairMatrix(*random_pair(8, 6, dtype=dtype)),
        PairExperts(random_pair(3, 8, 6, dtype=dtype), None, transposed=False),
    ):
        room = source.blend(0.2)
        assert source.blend(0.7, room) is room
        assert torch.equal(room, source.blend(0.7))


def test_a_blend_has_storage_of_its_own() -> None:
    """A view of the pair would keep the bytes of both endpoints."""
    for dtype in (torch.float32, torch.bfloat16):
        blend = PairMatrix(*random_pair(8, 6, dtype=dtype)).blend(0.5)
        experts = PairExperts(random_pair(3, 8, 6, dtype=dtype), None, transposed=True).blend(0.5)
        assert blend.is_contiguous()
        for one in (blend, experts):
            assert one.untyped_storage().nbytes() == one.nbytes


# --- Building, reuse and eviction ---------------------------------------------------------------


def test_a_blend_is_built_at_its_first_use_and_then_found() -> None:
    cache, first, second = BlendCache(2), Source(8), Source(4)
    blend = cache.use(("0.attn", 0.5))
    assert (cache.nbytes, first.blends) == (0, 0)
    assert blend.get(first) is blend.get(first)
    assert (cache.nbytes, first.blends, second.blends) == (8, 1, 0)
    blend.get(second)
    assert (cache.nbytes, blend.nbytes) == (12, 12)
    assert fill(cache, ("0.attn", 0.5), first)[0] is blend.get(first)
    assert (cache.builds, cache.hits, first.blends) == (1, 1, 1)


def test_blends_are_separate_for_each_group_and_λ() -> None:
    cache, source = BlendCache(2), Source()
    keys = [("0.attn", 0.5), ("0.attn", 0.51), ("0.mlp", 0.5)]
    tensors = [fill(cache, key, source)[0] for key in keys]
    assert len({id(tensor) for tensor in tensors}) == cache.builds == 3
    assert [tensor[0] for tensor in tensors] == [50, 51, 50]


def test_the_least_recently_used_λ_of_a_group_is_evicted_first() -> None:
    cache, source = BlendCache(3), Source()
    keys: list[Key] = [("head", 0.1), ("head", 0.2), ("head", 0.3)]
    for key in [("embed", 0.1), *keys]:
        fill(cache, key, source)
    fill(cache, keys[0], source)
    fill(cache, ("head", 0.4), source)
    assert [key in cache for key in keys] == [True, False, True]
    assert ("embed", 0.1) in cache
    assert (cache.nbytes, cache.evictions) == (32, 1)


def test_an_evicted_place_is_reused_at_the_same_address() -> None:
    cache, source = BlendCache(1), Source()
    (first,) = fill(cache, ("head", 0.1), source)
    (second,) = fill(cache, ("head", 0.2), source)
    assert second.data_ptr() == first.data_ptr()
    assert (second == 20).all()
    assert (cache.nbytes, cache.builds, cache.evictions, source.blends) == (8, 2, 1, 2)


def test_a_cache_of_size_0_still_holds_one_blend_of_each_group() -> None:
    cache, source = BlendCache(0), Source()
    for value in (0.1, 0.2, 0.1):
        assert fill(cache, ("head", value), source)[0][0] == round(value * 100)
    assert (cache.builds, cache.hits, cache.evictions, source.blends) == (3, 0, 2, 3)
    cache.check_integrity()


def test_missing_counts_the_blends_that_are_not_built() -> None:
    cache = BlendCache(2)
    fill(cache, ("head", 0.1), Source())
    assert cache.missing([("head", 0.1), ("head", 0.2), ("0.mlp", 0.1)]) == 2
    assert (cache.builds, cache.hits) == (1, 0)


def test_common_place_is_the_place_in_which_all_blends_are_built() -> None:
    cache, sources = BlendCache(2), {group: Source() for group in ("0.attn", "0.mlp")}
    low, high = ([(group, value) for group in sources] for value in (0.1, 0.2))
    for key in (*low, *high):
        fill(cache, key, sources[key[0]])
    assert (cache.common_place(low), cache.common_place(high)) == (0, 1)
    assert cache.common_place([low[0], high[1]]) is None
    cache.use(("0.mlp", 0.3))  # takes the place of λ = 0.1, unbuilt as yet
    assert cache.common_place(low) is None
    assert cache.common_place([("0.attn", 0.1), ("0.mlp", 0.3)]) is None
    fill(cache, ("0.mlp", 0.3), sources["0.mlp"])
    assert cache.common_place([("0.attn", 0.1), ("0.mlp", 0.3)]) == 0


def test_forget_keeps_the_allocated_memory() -> None:
    cache, source = BlendCache(2), Source()
    before = [fill(cache, ("head", value), source)[0].data_ptr() for value in (0.1, 0.2)]
    cache.forget()
    assert (cache.builds, cache.hits, cache.nbytes) == (0, 0, 16)
    assert ("head", 0.1) not in cache
    after = [fill(cache, ("head", value), source)[0].data_ptr() for value in (0.3, 0.1)]
    assert after == before
    cache.check_integrity()


def test_a_group_that_is_not_built_is_blended_and_not_replaced_by_an_endpoint() -> None:
    groups = BlendGroups(1, torch.device("cpu"), BlendCache())
    pair = PairMatrix(*random_pair(8, 6))
    groups.begin(StepRows((Dial(0.3),), (0, 0), (1,), blended=True))
    rows = groups.slot("0.attn", logits_only=False).rows
    assert rows.way is Way.BLENDED
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pair.product(x, rows), x @ pair.blend(0.3).T)
    for endpoint in pair.endpoints:
        assert (pair.product(x, rows) - x @ endpoint.T).abs().max() > 0.1


# --- Random forwards ----------------------------------------------------------------------------

KEYS = st.tuples(st.sampled_from(("embed", "0.attn", "0.mlp", "head")), st.sampled_from(VALUES))
FORWARDS = st.lists(st.tuples(KEYS, st.sets(st.integers(0, 3))), max_size=60)


@given(forwards=FORWARDS, places=st.integers(0, 4))
def test_random_forwards_keep_every_invariant(
    forwards: list[tuple[Key, set[int]]], places: int
) -> None:
    """The reference lists the last λ values of each group, in order of use."""
    sources = [Source(size) for size in (0, 3, 8, 20)]
    cache = BlendCache(places)
    held: dict[str, OrderedDict[float, set[int]]] = {}
    for key, wanted in forwards:
        mine = held.setdefault(key[0], OrderedDict())
        blend = cache.use(key)
        mine.setdefault(key[1], set())
        mine.move_to_end(key[1])
        if len(mine) > max(1, places):
            mine.popitem(last=False)
        for index in wanted:
            blends = sources[index].blends
            tensor = blend.get(sources[index])
            assert (tensor == round(key[1] * 100)).all()
            assert sources[index].blends - blends == (index not in mine[key[1]])
            mine[key[1]].add(index)
        cache.check_integrity()
        keys = {(group, value) for group, values in held.items() for value in values}
        assert cache.missing(keys) == 0
        assert cache.builds - cache.evictions == len(keys)
    assert cache.builds + cache.hits == len(forwards)
    assert cache.nbytes <= max(1, places) * len(held) * 31
