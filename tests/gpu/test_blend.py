"""A GPU blends weights to the bits of the fp32 lerp rounded once, as a CPU does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mi_runtime.model.delta import DeltaExperts
from mi_runtime.model.weights import PairExperts, PairMatrix, VocabularyPair
from tests.gpu.conftest import DEVICE

Pair = tuple[Tensor, Tensor]
VALUES = [step / 100 for step in range(101)]


def near(*shape: int, dtype: torch.dtype) -> Pair:
    """Returns two tensors as near as those of two checkpoints of one model."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    low, noise = torch.randn(2, *shape, generator=generator, device=DEVICE)
    return low.to(dtype), (low + 0.1 * noise).to(dtype)


def any_bits(*shape: int, dtype: torch.dtype) -> Pair:
    """Returns every kind of number of two bytes, including subnormals, infinities and NaN."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, *shape), generator=generator, device=DEVICE)
    low, high = bits.to(torch.int16).view(dtype)
    return low, high


def differing(one: Tensor, other: Tensor) -> int:
    """Returns how many numbers differ in their bits; any two NaN are equal."""
    nan = one.isnan() & other.isnan()
    return int((~nan & (one.view(torch.int16) != other.view(torch.int16))).sum())


def rounded_once(pair: Pair, value: float) -> Tensor:
    low, high = (side.float() for side in pair)
    return torch.lerp(low, high, value).to(pair[0].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [near, any_bits])
def test_a_blend_is_the_fp32_lerp_rounded_once(
    numbers: Callable[..., Pair], dtype: torch.dtype
) -> None:
    pair = numbers(509, 1021, dtype=dtype)
    strided, apart = PairMatrix(*pair), VocabularyPair(*pair)
    for value in VALUES:
        expected = rounded_once(pair, value)
        assert not differing(strided.blend(value), expected)
        assert not differing(apart.blend(value), expected)


def test_a_gpu_blend_equals_the_cpus() -> None:
    """Checkpoints are merged on a CPU."""
    pair = near(509, 1021, dtype=torch.bfloat16)
    on_cpu = VocabularyPair(*(side.cpu() for side in pair))
    for value in VALUES:
        assert not differing(VocabularyPair(*pair).blend(value).cpu(), on_cpu.blend(value))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_blend_of_experts_has_the_layout_of_its_endpoints(transposed: bool) -> None:
    pair = near(4, 96, 160, dtype=torch.bfloat16)
    low, high = (side.mT if transposed else side for side in pair)
    blend = PairExperts(pair, None, transposed).blend(0.3)
    assert not differing(blend, rounded_once((low, high), 0.3))
    assert blend.stride() == low.stride()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_rounded_difference_is_added_in_fp32(kind: str) -> None:
    """It agrees to one rounding of the result: a GPU may fuse the operations, a CPU does not."""
    pair = near(4, 96, 160, dtype=torch.bfloat16)
    experts = DeltaExperts(pair, None, False, kind)  # type: ignore[arg-type]
    exact = pair[0].double() + 0.3 * experts.delta.dequantized(torch.float32).double()
    error = (experts.blend(0.3).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()
