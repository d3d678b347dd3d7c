"""Stores a pair as the Instruct weights and a quantized difference D̂ of D = W_T − W_I.

    W(λ) x = W_I x + λ (D̂ x),    D̂ = scale · q

λ = 0 is exactly Instruct. λ = 1 is W_I + D̂, the Thinking checkpoint up to the rounding of D. So it
is not an endpoint, and is computed like any λ in between.

    kind   q                        scales                           size, in bf16 copies
    int8   −127..127, one per byte  one per output row, fp32         1.5
    int4   −8..7, two per byte      one per GROUP of inputs, bf16    1.25 + 1/64

D is computed in fp32, and rounding it costs at most half a step: for int8 1/254 of the row's
largest |D|, for int4 1/16 of the group's. The largest value of an int4 group is exactly −8, with
its sign in the scale. q is chosen for the scale as stored, so that rounding scales to bf16 adds no
error.

Layout, as kernels read it, with K inputs per row, all contiguous:

    instruct  [..., out, K]
    values    int8   [..., out, K]
              int4   uint8 [..., out, ceil(K / GROUP) · GROUP / 2]; byte j of group g holds q + 8 of
                     input g·GROUP + j in its low nibble, and of g·GROUP + GROUP/2 + j in its high
                     one: each nibble of adjacent bytes is a run of adjacent inputs
    scales    int8   fp32 [..., out, 1];  int4   bf16 [..., out, ceil(K / GROUP)]

Inputs beyond K in the last group are zeros, stored as 8. Norms, biases, routers and sinks are small
and stay exact pairs. This module is plain torch: it serves on a CPU and is the reference for
kernels. D̂ is dequantized piece by piece, so that a full copy of it never exists.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_runtime.kernels.dispatch import KernelDispatch
from mi_runtime.model.row_lambdas import INSTRUCT, THINKING, Rows
from mi_runtime.model.weights import add_expert_bias, detached_from_file, stacked_biases

DeltaKind = Literal["int8", "int4"]
GROUP = 64  # inputs that share a scale of int4
# Values (de)quantized at once. On a CPU their fp32 copies fit in its cache. On a GPU every
# operation on a piece is one launch, and a copy takes 128 MiB.
PIECE_OF_CPU, PIECE_OF_GPU = 1 << 18, 1 << 25
INT8_MOST = 127


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """The quantized difference D̂ of a matrix `[out, in]`, some of its rows, or `[…, out, in]`."""

    values: Tensor  # int8, or uint8 with two int4 per byte
    scales: Tensor
    inputs: int  # K

    def __getitem__(self, index: object) -> "Delta":
        """Indexes the dimensions before the last one."""
        return Delta(self.values[index], self.scales[index], self.inputs)  # type: ignore[index]

    @property
    def kind(self) -> DeltaKind:
        return "int8" if self.values.dtype is torch.int8 else "int4"

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns D̂ `[…, out, in]`, computed in fp32 and rounded once."""
        steps, scales = self._in_groups()
        out = torch.empty(steps.shape, dtype=dtype, device=steps.device)
        return torch.mul(steps, scales, out=out).flatten(-2)[..., : self.inputs]

    def added_to(self, base: Tensor, share: float | Tensor, out: Tensor | None = None) -> Tensor:
        """Returns `base` + `share` · D̂ `[…, out, in]`, computed in fp32 and rounded once.

        The result has the dtype of `out`, if given. A tensor of shares is `[…, out, 1, 1]`.
        """
        steps, scales = self._in_groups()
        scales = (scales * share).expand(steps.shape)
        flat = [tensor.flatten(-2)[..., : self.inputs] for tensor in (steps, scales)]
        return torch.addcmul(base, *flat, out=out)

    def _in_groups(self) -> tuple[Tensor, Tensor]:
        """Returns q int8 `[…, out, groups, group size]`, and fp32 scales `[…, out, groups, 1]`."""
        scales = self.scales.float().unsqueeze(-1)
        if self.kind == "int8":
            return self.values.unsqueeze(-2), scales
        pairs = _grouped(self.values, GROUP // 2)
        return torch.cat((pairs & 15, pairs >> 4), dim=-1).view(torch.int8).sub_(8), scales


def quantize(instruct: Tensor, thinking: Tensor, kind: DeltaKind) -> Delta:
    """Returns D̂ of two tensors `[…, out, in]` on one device."""
    *outer, inputs = instruct.shape
    encode, shapes, dtypes = (
        (_int8, (inputs, 1), (torch.int8, torch.float32))
        if kind == "int8"
        else (_int4, _int4_shapes(inputs), (torch.uint8, torch.bfloat16))
    )
    values, scales = (
        torch.empty(*outer, size, dtype=dtype, device=instruct.device)
        for size, dtype in zip(shapes, dtypes, strict=True)
    )
    for piece in _pieces(instruct):
        values[piece], scales[piece] = encode(thinking[piece].float() - instruct[piece].float())
    return Delta(values, scales, inputs)


def _int8(difference: Tensor) -> tuple[Tensor, Tensor]:
    scales = difference.abs().amax(-1, keepdim=True) / INT8_MOST
    steps = (difference / _divisor(scales)).round().clamp(-INT8_MOST, INT8_MOST)
    return steps.to(torch.int8), scales


def _int4(difference: Tensor) -> tuple[Tensor, Tensor]:
    groups = _grouped(F.pad(difference, (0, -difference.shape[-1] % GROUP)), GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    scales = (largest / -8).to(torch.bfloat16)
    nibbles = ((groups / _divisor(scales.float())).round().clamp(-8, 7) + 8).to(torch.uint8)
    first, second = nibbles.chunk(2, dim=-1)
    return (first | second << 4).flatten(-2), scales.squeeze(-1)


def _grouped(tensor: Tensor, size: int) -> Tensor:
    """Reshapes `[…, n]` to `[…, n / size, size]`."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)


def _int4_shapes(inputs: int) -> tuple[int, int]:
    groups = -(-inputs // GROUP)
    return groups * GROUP // 2, groups


def _divisor(scales: Tensor) -> Tensor:
    """Replaces zero scales, whose steps are all zero, by 1."""
    return torch.where(scales == 0, 1.0, scales)


def _pieces(tensor: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Yields indices of pieces that cover `[…, out, in]`."""
    return _pieces_of(tensor.shape, PIECE_OF_CPU if tensor.device.type == "cpu" else PIECE_OF_GPU)


def _pieces_of(shape: Sequence[int], piece: int) -> Iterator[tuple[int | slice, ...]]:
    """Yields indices of many matrices, of one, or of some rows, with at most `piece` values."""
    count, *inner = shape
    if len(inner) > 1 and prod(inner) > piece:
        for index in range(count):
            yield from ((index, *rest) for rest in _pieces_of(inner, piece))
    else:
        step = max(1, piece // prod(inner))
        yield from ((slice(first, first + step),) for first in range(0, count, step))


def blended(instruct: Tensor, delta: Delta, value: float, out: Tensor | None = None) -> Tensor:
    """Returns W_I + λ D̂, contiguous, computed in fp32 and rounded once to Instruct's dtype."""
    if out is None:
        out = torch.empty(instruct.shape, dtype=instruct.dtype, device=instruct.device)
    for piece in _pieces(instruct):
        delta[piece].added_to(instruct[piece], value, out[piece])
    return out


def delta_product(x: Tensor, instruct: Tensor, delta: Delta, lambdas: Tensor) -> Tensor:
    """Multiplies `x` `[…, rows, in]` by W_I + λ D̂; returns `[…, rows, out]`.

    `lambdas` is fp32 `[rows]` or `[1]`. The two products are added in fp32. A row at λ = 0 has
    exactly Instruct's product.
    """
    out = F.linear(x, instruct)
    for (piece,) in _pieces(instruct):
        difference = F.linear(x, delta[piece].dequantized(x.dtype))
        out[..., piece] = out[..., piece].float() + lambdas.unsqueeze(-1) * difference.float()
    return out


class DeltaWeights:
    """One matrix `[out, in]`, or those of all experts, with a quantized difference."""

    name = ""

    def __init__(
        self,
        instruct: Tensor,
        thinking: Tensor,
        kind: DeltaKind,
        kernels: KernelDispatch | None = None,
    ) -> None:
        self.kernels = kernels or KernelDispatch()
        self.instruct = detached_from_file(instruct).contiguous()
        self.delta = quantize(self.instruct, thinking, kind)

    @property
    def parameters(self) -> int:
        """The number of parameters of both endpoints."""
        return 2 * self.instruct.numel()

    @property
    def nbytes(self) -> int:
        return self.instruct.nbytes + self.delta.nbytes

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """Returns W_I + λ D̂, rounded once; writes it to `out` if given."""
        return blended(self.instruct, self.delta, value, out)


class DeltaMatrix(DeltaWeights):
    """A matrix `[out, in]` at every λ, in the place of `weights.PairMatrix`."""

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """Multiplies `x` `[..., rows, in]`, each row at its λ; returns `[..., rows, out]`."""
        if rows.endpoint is not None:
            assert rows.endpoint == INSTRUCT, "Thinking itself is not stored"
            return F.linear(x, self.instruct)
        if rows.blend is not None:
            return F.linear(x, rows.blend.get(self))
        if self.kernels.takes(x):
            values, scales = self.delta.values, self.delta.scales
            return self.kernels.delta(x, self.instruct, values, scales, rows.lambdas)
        return delta_product(x, self.instruct, self.delta, rows.lambdas)


class DeltaVocabulary(DeltaMatrix):
    """The matrix `[vocabulary, dim]` of an embedding, a head, or both."""

    def lookup(self, ids: Tensor, rows: Rows) -> Tensor:
        """Looks up `ids` `[..., rows]`, each at its λ; returns `[..., rows, dim]`."""
        found = F.embedding(ids, self.instruct)
        if rows.endpoint is not None:
            return found
        share = rows.lambdas.view(-1, 1, 1)
        return self.delta[ids].added_to(found, share).to(found.dtype)


class DeltaExperts(DeltaWeights):
    """One projection of all experts, stored `[experts, out, in]` even if the model transposes it.

    Biases are an exact pair.
    """

    def __init__(
        self,
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor] | None,
        transposed: bool,
        kind: DeltaKind,
        kernels: KernelDispatch | None = None,
    ) -> None:
        instruct, thinking = (weight.mT if transposed else weight for weight in weights)
        super().__init__(instruct, thinking, kind, kernels)
        self.biases = stacked_biases(biases)

    def product(self, expert: int, x: Tensor, rows: Rows, mix: Tensor) -> Tensor:
        """Multiplies `x` `[rows, in]` by one expert's matrix; returns `[rows, out]`.

        `mix` is `[rows or 1, 2, 1]`: (1−λ) and λ of each row.
        """
        if rows.endpoint is not None:
            assert rows.endpoint == INSTRUCT, "Thinking itself is not stored"
            out = F.linear(x, self.instruct[expert])
        elif rows.blend is not None:
            out = F.linear(x, rows.blend.get(self)[expert])
        else:
            lambdas = mix[:, THINKING, 0]
            out = delta_product(x, self.instruct[expert], self.delta[expert], lambdas)
        return add_expert_bias(out, self.biases, expert, rows, mix)

    def operands(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns what a kernel reads for the step's way: matrix, second matrix, scales."""
        if rows.endpoint is not None:
            assert rows.endpoint == INSTRUCT, "Thinking itself is not stored"
            return self.instruct, None, None
        if rows.blend is not None:
            return rows.blend.get(self), None, None
        return self.instruct, self.delta.values, self.delta.scales


@dataclass(frozen=True, slots=True)
class DeltaStorage:
    """Stores every large matrix as Instruct and a quantized difference of one kind."""

    kind: DeltaKind
    kernels: KernelDispatch = field(default_factory=KernelDispatch)

    @property
    def endpoints(self) -> Mapping[float, int]:
        return {0.0: INSTRUCT}

    def matrix(self, instruct: Tensor, thinking: Tensor) -> DeltaMatrix:
        return DeltaMatrix(instruct, thinking, self.kind, self.kernels)

    def vocabulary(self, instruct: Tensor, thinking: Tensor) -> DeltaVocabulary:
        return DeltaVocabulary(instruct, thinking, self.kind, self.kernels)

    def experts(
        self, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor] | None, transposed: bool
    ) -> DeltaExperts:
        return DeltaExperts(weights, biases, transposed, self.kind, self.kernels)
