"""Pair products at the shapes of real models, against fp32 on the same GPU.

What a server needs most comes first. Each number of rows has tiles of its own, which compile in a
second; matrices differ in how their K is split.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mi_runtime.model.delta import quantize
from tests.gpu.conftest import DEVICE, REHEARSED, on_a_gpu_only

pytest.importorskip("triton")
from mi_runtime.kernels.pair_linear import (
    align,
    delta_linear,
    grouped_linear,
    pair_linear,
)

pytestmark = pytest.mark.usefixtures("poisoned")

MATRICES = {  # [out, in] of Qwen3-4B
    "q, k and v": (6144, 2560),
    "gate and up": (19456, 2560),
    "down": (2560, 9728),
    "output of attention": (2560, 4096),
}
if REHEARSED:  # an interpreter computes a program at a time
    MATRICES = {"gate and up": (70, 256), "down": (40, 1088)}
FEW = ("gate and up", "down")  # the widest, and one whose K is split
# Of Qwen3-30B-A3B: how many, chosen, and gate and up of one.
EXPERTS = (8, 2, 48, 128) if REHEARSED else (128, 8, 1536, 2048)
ROWS = (3, 1) if REHEARSED else (32, 1, 64, 256)  # each with tiles of its own
SOME_ROWS = ROWS if REHEARSED else (32, 1, 256)
WIDTH = {
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float32: 2**-20,
}  # of a rounding


def random(
    *shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def endpoints(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Returns strided views of one tensor `[…, out, 2, in]`, as `PairMatrix` stores them."""
    low = random(*shape, scale=0.02, seed=1, dtype=dtype)
    both = torch.stack((low, low + random(*shape, scale=0.002, seed=2, dtype=dtype)), dim=-2)
    return both[..., 0, :], both[..., 1, :]


def lambdas(rows: int) -> Tensor:
    return torch.linspace(0, 1, rows + 2, device=DEVICE)[1:-1]


def mixed(x: Tensor, low: Tensor, high: Tensor, weights: Tensor) -> Tensor:
    return torch.lerp(x.float() @ low.float().mT, x.float() @ high.float().mT, weights[:, None])


def assert_near(result: Tensor, exact: Tensor) -> None:
    """Asserts that each number is at most one rounding away, and a little for the order of sums."""
    slack = exact.abs() * WIDTH[result.dtype] + 1e-4 * exact.abs().max()
    assert ((result.float() - exact).abs() <= slack).all()


def check_pair(matrix: str, rows: int, dtype: torch.dtype) -> None:
    columns, depth = MATRICES[matrix]
    x, weights = random(rows, depth, dtype=dtype), lambdas(rows)
    low, high = endpoints(columns, depth, dtype=dtype)
    result = pair_linear(x, low, high, weights)
    assert_near(result, mixed(x, low, high, weights))
    assert torch.equal(result, pair_linear(x, low, high, weights)), "other bits when repeated"


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_pair_product_is_both_products_mixed_row_by_row(matrix: str, rows: int) -> None:
    check_pair(matrix, rows, torch.bfloat16)


def test_all_rows_may_share_one_λ() -> None:
    columns, depth = MATRICES["down"]
    x, (low, high) = random(32, depth), endpoints(columns, depth)
    one, each = (torch.full((rows,), 0.3, device=DEVICE) for rows in (1, 32))
    assert torch.equal(pair_linear(x, low, high, one), pair_linear(x, low, high, each))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_nan_and_infinity_of_one_endpoint_never_reach_rows_at_the_other(bad: float) -> None:
    columns, depth = MATRICES["down"]
    x, (low, high) = random(3, depth), endpoints(columns, depth)
    weights = torch.tensor([0.0, 0.5, 1.0], device=DEVICE)
    clean = pair_linear(x, low, high, weights)
    high[:, 7] = bad
    spoiled = pair_linear(x, low, high, weights)
    assert torch.equal(spoiled[0], clean[0])
    assert not spoiled[1:].isfinite().any()


@pytest.mark.parametrize("matrix", FEW)
@pytest.mark.parametrize("rows", SOME_ROWS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_product_with_a_delta_is_that_of_its_dequantized_weights(
    kind: str, rows: int, matrix: str
) -> None:
    columns, depth = MATRICES[matrix]
    x, (low, high), weights = random(rows, depth), endpoints(columns, depth), lambdas(rows)
    low = low.contiguous()
    delta = quantize(low, high, kind)  # type: ignore[arg-type]
    result = delta_linear(x, low, delta.values, delta.scales, weights)
    thinking = low.float() + delta.dequantized(torch.float32)
    assert_near(result, mixed(x, low, thinking, weights))


@on_a_gpu_only
@pytest.mark.parametrize("kind", ["pair", "int8", "int4"])
def test_a_product_can_be_captured_and_reads_the_λ_that_are_written_before_its_replay(
    kind: str,
) -> None:
    columns, depth = MATRICES["down"]
    x, (low, high), weights = random(8, depth), endpoints(columns, depth), lambdas(8)
    low = low.contiguous()
    product: Callable[[], Tensor] = lambda: pair_linear(x, low, high, weights)  # noqa: E731
    if kind != "pair":
        delta = quantize(low, high, kind)  # type: ignore[arg-type]
        product = lambda: delta_linear(x, low, delta.values, delta.scales, weights)  # noqa: E731
    product()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product()
    weights.copy_(weights.flip(0))
    x.normal_()
    graph.replay()
    assert torch.equal(out, product())


@pytest.mark.parametrize("rows", SOME_ROWS)
@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_each_row_is_computed_by_its_own_experts(kind: str, rows: int) -> None:
    experts, chosen, columns, depth = EXPERTS
    x, weights = random(rows, depth), lambdas(rows)
    low, high = endpoints(experts, columns, depth)
    generator = torch.Generator(DEVICE).manual_seed(3)
    ids = torch.rand(rows, experts, device=DEVICE, generator=generator).topk(chosen).indices
    second, scales = high, None
    if kind != "none":
        low = low.contiguous()
        delta = quantize(low, high, kind)  # type: ignore[arg-type]
        second, scales = delta.values, delta.scales
        high = low.float() + delta.dequantized(torch.float32)
    alignment = align(ids, experts)
    found = grouped_linear(x, low, second, scales, None, weights, alignment, True)
    order = alignment.order
    sources, owners = order // chosen, ids.flatten()[order]
    exact = torch.cat([
        mixed(x[row : row + 1], low[expert], high[expert], weights[row : row + 1])
        for row, expert in zip(sources.tolist(), owners.tolist(), strict=True)
    ])  # fmt: skip
    assert_near(found, exact)


@pytest.mark.parametrize("rows", ROWS[:2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_products_of_other_dtypes_agree_with_fp32(dtype: torch.dtype, rows: int) -> None:
    check_pair("down", rows, dtype)
