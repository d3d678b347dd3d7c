"""A rounded delta is within half a step of the difference, and every way computes with it."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mi_runtime.model import delta as module
from mi_runtime.model.blend_cache import Blend
from mi_runtime.model.delta import (
    GROUP,
    DeltaExperts,
    DeltaKind,
    DeltaMatrix,
    DeltaStorage,
    DeltaVocabulary,
    quantize,
)
from mi_runtime.model.row_lambdas import INSTRUCT, Rows

KINDS = get_args(DeltaKind)
WIDTHS = (1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 7)
LAMBDAS = (0.0, 0.1, 0.5, 0.93, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_pair(
    *shape: int, dtype: torch.dtype = torch.float32, apart: float = 0.1
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    instruct, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return instruct.to(dtype), (instruct + apart * noise).to(dtype)


def difference(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].float() - pair[0].float()


def dequantized(pair: tuple[Tensor, Tensor], kind: DeltaKind) -> Tensor:
    return quantize(*pair, kind).dequantized(torch.float32)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Asserts equality, in fp32 up to one or two roundings."""
    slack = 1e-6 if found.dtype is torch.float32 else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=slack)


def pair_rows(*values: float) -> Rows:
    return Rows(torch.tensor(values), None)


# --- Quantization -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_int8_is_at_most_half_a_step_of_its_row_from_the_difference(
    width: int, dtype: torch.dtype
) -> None:
    exact = difference(pair := random_pair(5, width, dtype=dtype))
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((dequantized(pair, "int8") - exact).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_int4_is_at_most_half_a_step_of_its_group_from_the_difference(
    width: int, dtype: torch.dtype
) -> None:
    """int4 has no +8, so that a value opposite the largest may be a complete step away."""
    exact = difference(pair := random_pair(5, width, dtype=dtype))
    kept = quantize(*pair, "int4")
    found = kept.dequantized(torch.float32)
    for index, group in enumerate(range(0, width, GROUP)):
        own, scale = exact[:, group : group + GROUP], kept.scales[:, index, None].float()
        most = own.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scale.abs(), most / 8, rtol=2**-8, atol=0)
        error = (found[:, group : group + GROUP] - own).abs() / scale.abs()
        assert (error <= torch.where(own / scale > 7.5, 1.05, 0.501)).all()


def test_the_two_int4_of_a_byte_are_half_a_group_apart() -> None:
    """Kernels depend on this layout."""
    steps = torch.arange(GROUP + 3) % 15 - 7
    steps[0] = steps[GROUP] = -8
    kept = quantize(torch.zeros(1, GROUP + 3), steps.float()[None], "int4")
    assert kept.values.shape == (1, GROUP)
    assert kept.scales.tolist() == [[1.0, 1.0]]
    first, second = kept.values[0, : GROUP // 2], kept.values[0, GROUP // 2 :]
    assert (first & 15).tolist() == (steps[: GROUP // 2] + 8).tolist()
    assert (first >> 4).tolist() == (steps[GROUP // 2 : GROUP] + 8).tolist()
    assert second.tolist() == [
        int(steps[GROUP + j] + 8 if j < 3 else 8) | 8 << 4 for j in range(GROUP // 2)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_of_the_endpoints_stay_equal(kind: DeltaKind) -> None:
    instruct, thinking = random_pair(6, 70, dtype=torch.bfloat16)
    thinking[2:4] = instruct[2:4]
    matrix = DeltaMatrix(instruct, thinking, kind)
    for value in LAMBDAS:
        assert torch.equal(matrix.blend(value)[2:4], instruct[2:4])
    assert matrix.blend(1.0).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 70), (3, 9, 70)])
@pytest.mark.parametrize("rows", [4, 20])
def test_quantizing_in_pieces_equals_quantizing_at_once(
    kind: DeltaKind, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = random_pair(*shape)
    at_once, blend = quantize(*pair, kind), DeltaMatrix(*pair, kind).blend(0.3)
    monkeypatch.setattr(module, "PIECE_OF_CPU", rows * 70)
    pieces = quantize(*pair, kind)
    assert torch.equal(at_once.values, pieces.values)
    assert torch.equal(at_once.scales, pieces.scales)
    assert_same(DeltaMatrix(*pair, kind).blend(0.3), blend)


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [((19456, 2560), 2), ((128, 1536, 2048), 13), ((8, 6144, 16384), 24)],
    ids=["a matrix", "many small experts", "few large experts"],
)
def test_large_weights_are_processed_in_few_pieces_on_a_gpu(
    shape: tuple[int, ...], pieces: int
) -> None:
    """Each piece takes several launches, for every matrix of a prefill."""
    there = torch.empty(shape, device="meta")
    parts = [there[piece] for piece in module._pieces(there)]
    assert len(parts) == pieces
    assert sum(part.numel() for part in parts) == there.numel()
    assert max(part.numel() for part in parts) <= module.PIECE_OF_GPU


@pytest.mark.parametrize(("kind", "copies"), [("int8", 1.5), ("int4", 1.25 + 1 / GROUP)])
def test_delta_matrix_size_matches_the_docs(kind: DeltaKind, copies: float) -> None:
    pair = random_pair(64, 64 * GROUP, dtype=torch.bfloat16)
    assert DeltaMatrix(*pair, kind).nbytes / pair[0].nbytes == pytest.approx(copies, abs=1e-3)


# --- Products and lookups -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_blend_is_instruct_plus_λ_times_the_delta_rounded_once(
    kind: DeltaKind, dtype: torch.dtype
) -> None:
    pair = random_pair(9, 70, dtype=dtype)
    kept = dequantized(pair, kind)
    matrix = DeltaMatrix(*pair, kind)
    for value in LAMBDAS:
        assert_same(matrix.blend(value), (pair[0].float() + value * kept).to(dtype))
    assert torch.equal(matrix.blend(0.0), pair[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 70), (1, 5, 70), (2, 5, 70)])
def test_every_row_is_multiplied_with_its_own_blend(
    kind: DeltaKind, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_OF_CPU", 4 * 70)
    matrix = DeltaMatrix(*random_pair(9, 70), kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = matrix.product(x, pair_rows(*LAMBDAS))
    for row, value in enumerate(LAMBDAS):
        expected = F.linear(x[..., row, :], matrix.blend(value))
        torch.testing.assert_close(out[..., row, :], expected, atol=1e-5, rtol=1e-5)
        alone = matrix.product(x, pair_rows(value))
        torch.testing.assert_close(alone[..., row, :], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_λ_0_do_not_depend_on_other_rows(kind: DeltaKind, dtype: torch.dtype) -> None:
    instruct, thinking = random_pair(9, 70, dtype=dtype)
    matrix = DeltaVocabulary(instruct, thinking, kind)
    x, ids = torch.randn(2, 70).to(dtype), torch.tensor([3, 3])
    own = F.linear(x, instruct)
    assert torch.equal(matrix.product(x, pair_rows(0.0, 0.7))[0], own[0])
    assert not torch.equal(matrix.product(x, pair_rows(0.0, 0.7))[1], own[1])
    assert torch.equal(matrix.product(x, Rows(torch.zeros(1), INSTRUCT)), own)
    assert torch.equal(matrix.lookup(ids, pair_rows(0.0, 0.7))[0], instruct[3])
    assert torch.equal(matrix.lookup(ids, Rows(torch.zeros(1), INSTRUCT)), instruct[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_products_are_as_exact_as_those_of_merged_weights(kind: DeltaKind) -> None:
    pair = random_pair(64, 256, dtype=torch.bfloat16)
    matrix, x = DeltaMatrix(*pair, kind), torch.randn(8, 256).bfloat16()
    truth = x.double() @ (pair[0].double() + 0.5 * dequantized(pair, kind).double()).T
    served = (matrix.product(x, pair_rows(0.5)) - truth).abs().mean()
    static = (F.linear(x, matrix.blend(0.5)) - truth).abs().mean()
    assert served < 1.1 * static


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_lookup_returns_rows_of_the_blend(kind: DeltaKind, dtype: torch.dtype) -> None:
    vocabulary = DeltaVocabulary(*random_pair(9, 70, dtype=dtype), kind)
    ids = torch.tensor([[4, 0, 8, 4, 2]])
    out = vocabulary.lookup(ids, pair_rows(*LAMBDAS))
    for row, value in enumerate(LAMBDAS):
        assert_same(out[0, row], vocabulary.blend(value)[ids[0, row]])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_computes_as_a_matrix_of_its_own(
    kind: DeltaKind, has_bias: bool, transposed: bool
) -> None:
    instruct, thinking = random_pair(3, 9, 70)
    given = (
        (instruct.mT.contiguous(), thinking.mT.contiguous()) if transposed else (instruct, thinking)
    )
    biases = random_pair(3, 9) if has_bias else None
    experts = DeltaExperts(given, biases, transposed, kind)
    x, rows = torch.randn(len(LAMBDAS), 70), pair_rows(*LAMBDAS)
    for expert in range(3):
        alone = DeltaMatrix(instruct[expert], thinking[expert], kind)
        assert_same(experts.blend(0.3)[expert], alone.blend(0.3))
        expected = alone.product(x, rows)
        if biases is not None:
            expected += torch.lerp(*(one[expert] for one in biases), rows.lambdas.unsqueeze(1))
        found = experts.product(expert, x, rows, rows.mix)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", LAMBDAS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_blended_weights_multiplies_with_them(kind: DeltaKind, value: float) -> None:
    storage = DeltaStorage(kind)
    rows = Rows(torch.tensor([value]), None, Blend(0, value))
    matrix, x = storage.matrix(*random_pair(9, 70)), torch.randn(4, 70)
    assert torch.equal(matrix.product(x, rows), F.linear(x, matrix.blend(value)))
    experts = storage.experts(random_pair(2, 9, 70), None, transposed=False)
    assert torch.equal(experts.product(1, x, rows, rows.mix), F.linear(x, experts.blend(value)[1]))


def test_only_λ_0_is_an_endpoint() -> None:
    assert dict(DeltaStorage("int8").endpoints) == {0.0: INSTRUCT}
