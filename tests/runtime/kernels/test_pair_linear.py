"""The pair kernels, interpreted on the CPU, compute what plain torch computes.

`tests/bench/test_kernel_code.py` tests what the compiler makes of them for a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mi_runtime.kernels import pair_linear as kernels
from mi_runtime.kernels.pair_linear import align, delta_linear, grouped_linear, pair_linear

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Columns and K that no tile divides; the second has its K split.
SHAPES = pytest.mark.parametrize(("columns", "depth"), [(70, 50), (40, 1100)])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def lambdas(rows: int) -> Tensor:
    """Returns a λ for each row: 0, 1 and three between."""
    return (torch.arange(rows) % 5 / 4).float()


def assert_near(result: Tensor, exact: Tensor) -> None:
    """Allows for one rounding of every number, and a little for the order of the sums."""
    slack = exact.abs() * ROUNDING[result.dtype] + 1e-5 * exact.abs().max()
    assert ((result.float() - exact).abs() <= slack).all()


def pair(columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns both matrices as `PairMatrix` stores them: strided views of one tensor."""
    both = random(columns, 2, depth, dtype=dtype)
    return both[:, 0], both[:, 1]


def exact_pair(x: Tensor, low: Tensor, high: Tensor, weights: Tensor) -> Tensor:
    a, b = x.float() @ low.float().mT, x.float() @ high.float().mT
    return torch.lerp(a, b, weights[:, None])


# --- Dense --------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (1, torch.float32),
        (17, torch.float32),
        (40, torch.float32),
        (17, torch.float16),
        (3, torch.bfloat16),
    ],
)
def test_a_pair_product_interpolates_both_products_row_by_row(
    rows: int, columns: int, depth: int, dtype: torch.dtype
) -> None:
    x, (low, high) = random(rows, depth, dtype=dtype), pair(columns, depth, dtype)
    for weights in (lambdas(rows), torch.tensor([0.3])):
        assert_near(pair_linear(x, low, high, weights), exact_pair(x, low, high, weights))


def test_tiles_for_many_rows_compute_the_same() -> None:
    x, (low, high), weights = random(150, 70), pair(40, 70, torch.float32), lambdas(150)
    assert_near(pair_linear(x, low, high, weights), exact_pair(x, low, high, weights))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize(("depth", "bad"), [(50, torch.nan), (1100, torch.inf)])
def test_nan_and_infinity_of_one_endpoint_never_reach_rows_at_the_other(
    depth: int, bad: float
) -> None:
    x, weights = random(3, depth), torch.tensor([0.0, 0.5, 1.0])
    low, high = pair(40, depth, torch.float32)
    clean = pair_linear(x, low, high, weights)
    high[:, 7] = bad
    spoiled = pair_linear(x, low, high, weights)
    assert torch.equal(spoiled[0], clean[0])
    assert not spoiled[1:].isfinite().any()
    spoiled = pair_linear(x, high, low, weights)
    assert torch.equal(spoiled[2], pair_linear(x, low, low, weights)[2])


def test_a_row_has_the_same_bits_whatever_the_other_rows_are() -> None:
    """The row stays at its place, as the interpreter's numpy may round differently at another."""
    x, (low, high), weights = random(9, 1100), pair(40, 1100, torch.float32), lambdas(9)
    together = pair_linear(x, low, high, weights)
    for row in (0, 4, 8):
        others, their_weights = random(9, 1100) + 5, 1 - weights
        others[row], their_weights[row] = x[row], weights[row]
        among_others = pair_linear(others, low, high, their_weights)
        assert torch.equal(among_others[row], together[row])
        assert not torch.equal(among_others[row - 1], together[row - 1])


def test_splitting_k_gives_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (low, high), weights = random(3, 1100), pair(40, 1100, torch.float32), lambdas(3)
    split = pair_linear(x, low, high, weights)
    assert torch.equal(split, pair_linear(x, low, high, weights))
    monkeypatch.setattr(kernels, "MAX_SPLITS", 1)
    unsplit = pair_linear(x, low, high, weights)
    assert not torch.equal(split, unsplit)  # otherwise nothing was split
    torch.testing.assert_close(split, unsplit)


def test_matrices_and_inputs_may_be_strided() -> None:
    x, low, high = random(5, 2, 64)[:, 1], random(64, 40).mT, random(64, 40).mT
    expected = exact_pair(x, low, high, lambdas(5))
    assert_near(pair_linear(x, low, high, lambdas(5)), expected)
    assert_near(pair_linear(x.mT.contiguous().mT, low, high, lambdas(5)), expected)


def test_no_rows_give_no_rows() -> None:
    low, high = pair(40, 64, torch.float32)
    assert pair_linear(random(0, 64), low, high, lambdas(0)).shape == (0, 40)


# --- Grouped by expert --------------------------------------------------------------------------

ASSIGNMENTS = {
    "no row for some, several for others": ([[0, 2], [2, 4], [2, 0], [4, 2]], 6),
    "one expert for all": ([[3]] * 19, 5),
    "every expert for every row": ([[1, 0, 2]] * 23, 3),
    "one row": ([[1, 3]], 40),
}


def exact_grouped(
    x: Tensor, low: Tensor, high: Tensor, ids: Tensor, weights: Tensor, biases: Tensor | None
) -> Tensor:
    """Returns the expected rows; `x` has a row for each assignment to an expert."""
    out = []
    for row, (expert, value) in enumerate(
        zip(ids.flatten().tolist(), weights.repeat_interleave(ids.shape[1]), strict=True)
    ):
        a, b = x[row].float() @ low[expert].float().mT, x[row].float() @ high[expert].float().mT
        if biases is not None:
            a, b = a + biases[expert, 0].float(), b + biases[expert, 1].float()
        out.append(torch.lerp(a, b, value))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in ASSIGNMENTS),
        ("no row for some, several for others", torch.float16),
        ("no row for some, several for others", torch.bfloat16),
    ],
)
def test_each_row_is_computed_by_its_experts(case: str, dtype: torch.dtype) -> None:
    chosen, experts = ASSIGNMENTS[case]
    ids = torch.tensor(chosen)
    rows, top_k = ids.shape
    both, biases = random(experts, 70, 2, 50, dtype=dtype), random(experts, 2, 70, dtype=dtype)
    low, high = both[:, :, 0], both[:, :, 1]
    x, weights, alignment = random(rows, 50, dtype=dtype), lambdas(rows), align(ids, experts)

    out = grouped_linear(x, low, high, None, biases, weights, alignment, gather=True)
    each = x.repeat_interleave(top_k, dim=0)
    exact = exact_grouped(each, low, high, ids, weights, biases)
    assert_near(out, exact[alignment.order])

    own = random(rows * top_k, 50, dtype=dtype)
    sorted_own = own[alignment.order]
    out = grouped_linear(sorted_own, low, high, None, None, weights, alignment, gather=False)
    assert_near(out, exact_grouped(own, low, high, ids, weights, None))

    out = grouped_linear(sorted_own, low, None, None, biases, weights[:1], alignment, gather=False)
    at_instruct = torch.zeros(rows)
    assert_near(out, exact_grouped(own, low, low, ids, at_instruct, biases[:, :1].repeat(1, 2, 1)))


def test_experts_may_be_transposed() -> None:
    ids, weights = torch.tensor([[0, 1], [2, 1]]), torch.tensor([0.3])
    low, high, x = random(3, 48, 40).mT, random(3, 48, 40).mT + 1, random(2, 48)
    alignment = align(ids, 3)
    out = grouped_linear(x, low, high, None, None, weights, alignment, gather=True)
    each = x.repeat_interleave(2, dim=0)
    exact = exact_grouped(each, low, high, ids, weights.expand(2), None)
    assert_near(out, exact[alignment.order])


@settings(max_examples=settings.default.max_examples // 2)
@given(
    st.integers(1, 9).flatmap(
        lambda experts: st.tuples(
            st.just(experts),
            st.lists(st.integers(0, experts - 1), min_size=1, max_size=150),
        )
    )
)
def test_blocks_contain_every_assignment_once_and_have_one_expert_each(
    case: tuple[int, list[int]],
) -> None:
    experts, chosen = case
    alignment = align(torch.tensor(chosen).unsqueeze(1), experts)
    covered = []
    for owner, begin in zip(alignment.owners.tolist(), alignment.begins.tolist(), strict=True):
        if begin >= len(chosen):
            continue  # idle
        end = min(begin + alignment.block, int(alignment.edges[owner + 1]))
        mine = alignment.order[begin:end].tolist()
        assert {chosen[one] for one in mine} == {owner}
        covered += mine
    assert sorted(covered) == list(range(len(chosen)))


# --- Tracing for a GPU, without one -------------------------------------------------------------


def test_products_trace_with_fake_tensors_of_a_gpu() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        x, weights = empty(5, 64), empty(5, dtype=torch.float32)
        low, high = empty(48, 2, 64).unbind(1)
        assert pair_linear(x, low, high, weights).shape == (5, 48)
        int8, scales = empty(48, 64, dtype=torch.int8), empty(48, 1, dtype=torch.float32)
        assert delta_linear(x, low, int8, scales, weights).dtype == torch.bfloat16
        alignment = align(empty(5, 2, dtype=torch.int64), 8)  # any look from the host would raise
        experts = empty(8, 48, 64)
        out = grouped_linear(x, experts, None, None, None, weights, alignment, gather=True)
        assert (out.shape, out.device.type) == ((10, 48), "cuda")
