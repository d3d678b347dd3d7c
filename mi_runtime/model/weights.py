"""The weights of a pair: what the swapped modules of a model compute with.

A layer is linear in its weights, so for a row x with its own λ

    W(λ) x = (1−λ) W_I x + λ W_T x = [W_I | W_T] · [(1−λ)x ; λx]

and one product over concatenated inputs serves any mixture of λ values exactly, without forming
W(λ). A pair of matrices is stored once as `[out, 2, in]`: flattened it is the concatenated matrix,
each endpoint is a strided view of it, and a blend is one `torch.lerp` of the views, which computes
in fp32 for any dtype, rounds once, and allocates only its result.

    way        rows                  reads             multiply-adds
    endpoint   all at λ=0, or at 1   2P bytes          R·P
    blended    all at one λ          2P bytes          R·P      (4P read + 2P written, once)
    pair       any                   4P bytes          2·R·P    (P parameters of 2 bytes, R rows)

The interfaces here are implemented twice: by the classes of this module, which store both endpoints
in full (`PairStorage`), and by those of `delta.py`, which store a rounded difference. On a GPU,
products of few rows and of experts use the kernels of `mi_runtime/kernels/`.

Rejected: two separate products and a lerp (less accurate in bf16, two launches), and
`W_I + λ·(W_T − W_I)` in bf16 (misses the Thinking endpoint at λ = 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_runtime.kernels.dispatch import KernelDispatch
from mi_runtime.model.blend_cache import Blendable
from mi_runtime.model.row_lambdas import ENDPOINTS, INSTRUCT, THINKING, Rows, scaled_pair

VOCABULARY_PIECE = 16384  # tokens whose logits are blended at once, which bounds fp32 copies


class Weights(Blendable, Protocol):
    """Weights that can be computed at every λ, however both endpoints are stored."""

    @property
    def instruct(self) -> Tensor:
        """The exact weights of Instruct: `[out, in]`, or `[experts, out, in]`."""
        ...

    @property
    def parameters(self) -> int:
        """The number of parameters of both endpoints."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes that are stored for both endpoints, without biases."""
        ...


class Matrix(Weights, Protocol):
    """The weights of a linear module."""

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """Multiplies `x` `[..., rows, in]`, each row at its λ; returns `[..., rows, out]`."""
        ...


class VocabularyMatrix(Matrix, Protocol):
    """The weights of an embedding, a head, or both of a tied model."""

    def lookup(self, ids: Tensor, rows: Rows) -> Tensor:
        """Looks up `ids` `[..., rows]`, each at its λ; returns `[..., rows, dim]`."""
        ...


class ExpertMatrices(Weights, Protocol):
    """The weights of one projection of all experts."""

    kernels: KernelDispatch

    @property
    def biases(self) -> Tensor | None:
        """The biases of both endpoints, `[experts, 2, out]`, if there are any."""
        ...

    def operands(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns what a kernel reads for the step's way: matrix, second matrix, scales."""
        ...

    def product(self, expert: int, x: Tensor, rows: Rows, mix: Tensor) -> Tensor:
        """Multiplies `x` `[rows, in]` by one expert's matrix; returns `[rows, out]`.

        `mix` is `[rows or 1, 2, 1]`: (1−λ) and λ of each row.
        """
        ...


class Storage(Protocol):
    """How the large matrices of a pair are stored. It takes ownership of the tensors given."""

    @property
    def endpoints(self) -> Mapping[float, int]:
        """The λ values whose weights are stored exactly, and which endpoint each one is."""
        ...

    def matrix(self, instruct: Tensor, thinking: Tensor) -> Matrix:
        """Stores two matrices `[out, in]`."""
        ...

    def vocabulary(self, instruct: Tensor, thinking: Tensor) -> VocabularyMatrix:
        """Stores two matrices `[vocabulary, dim]`."""
        ...

    def experts(
        self, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor] | None, transposed: bool
    ) -> ExpertMatrices:
        """Stores expert weights `[experts, out, in]`, or if transposed `[experts, in, out]`."""
        ...


class PairMatrix:
    """Stores both endpoints' `[out, in]` matrices in one `[out, 2, in]` tensor."""

    name = ""

    def __init__(
        self, instruct: Tensor, thinking: Tensor, kernels: KernelDispatch | None = None
    ) -> None:
        self.kernels = kernels or KernelDispatch()
        both = torch.stack((instruct, thinking), dim=1)
        self.concatenated = both.flatten(1)  # [out, 2·in]
        self.endpoints = (both[:, INSTRUCT], both[:, THINKING])  # strided views

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """Returns Θ(λ), rounded once; writes it to `out` if given."""
        return torch.lerp(*self.endpoints, value, out=out)

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """Multiplies `x` `[..., rows, in]`, each row at its λ; returns `[..., rows, out]`."""
        if rows.endpoint is not None:
            return F.linear(x, self.endpoints[rows.endpoint])
        if rows.blend is not None:
            return F.linear(x, rows.blend.get(self))
        if self.kernels.takes(x):
            return self.kernels.pair(x, *self.endpoints, rows.lambdas)
        return F.linear(scaled_pair(x, rows.mix), self.concatenated)

    @property
    def instruct(self) -> Tensor:
        return self.endpoints[INSTRUCT]

    @property
    def parameters(self) -> int:
        """The number of parameters of both endpoints."""
        return self.concatenated.numel()

    @property
    def nbytes(self) -> int:
        return self.concatenated.nbytes


class VocabularyPair:
    """Stores both endpoints' `[vocabulary, dim]` matrices separately: embedding, head, or both.

    They are the largest matrices of a model, and stored separately, loading need not copy them. For
    the few rows that reach the head, two products and a lerp cost the same as one product over
    `2·dim`. Products are computed piece by piece, since the logits of 512 scored positions with
    their fp32 copies take over a GB.
    """

    name = ""

    def __init__(
        self, instruct: Tensor, thinking: Tensor, kernels: KernelDispatch | None = None
    ) -> None:
        self.kernels = kernels or KernelDispatch()
        self.endpoints = (instruct, thinking)

    @property
    def instruct(self) -> Tensor:
        return self.endpoints[INSTRUCT]

    @property
    def parameters(self) -> int:
        """The number of parameters of both endpoints."""
        return 2 * self.instruct.numel()

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.endpoints)

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """Returns Θ(λ), rounded once; writes it to `out` if given."""
        return torch.lerp(*self.endpoints, value, out=out)

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """Multiplies `x` `[..., rows, dim]`; returns `[..., rows, vocabulary]`."""
        if rows.endpoint is not None:
            return F.linear(x, self.endpoints[rows.endpoint])
        if rows.blend is not None:
            return F.linear(x, rows.blend.get(self))
        low, high = self.endpoints
        if self.kernels.takes(x):
            return self.kernels.pair(x, low, high, rows.lambdas)
        out = x.new_empty(*x.shape[:-1], len(low))
        for first in range(0, len(low), VOCABULARY_PIECE):
            piece = slice(first, first + VOCABULARY_PIECE)
            logits = F.linear(x, low[piece]), F.linear(x, high[piece])
            out[..., piece] = _lerp_rows(*logits, rows)
        return out

    def lookup(self, ids: Tensor, rows: Rows) -> Tensor:
        """Looks up `ids` `[..., rows]`, each at its λ; returns `[..., rows, dim]`.

        It blends only the rows that it looks up, which is cheaper than blending the matrix.
        """
        if rows.endpoint is not None:
            return F.embedding(ids, self.endpoints[rows.endpoint])
        low, high = self.endpoints
        return _lerp_rows(F.embedding(ids, low), F.embedding(ids, high), rows)


def _lerp_rows(instruct: Tensor, thinking: Tensor, rows: Rows) -> Tensor:
    """Interpolates two results `[..., rows, any]` row by row, in fp32, rounded once."""
    blend = torch.lerp(instruct.float(), thinking.float(), rows.lambdas.unsqueeze(-1))
    return blend.to(instruct.dtype)


class PairExperts:
    """Stores one projection of all experts, both endpoints in one tensor.

    Weights are `[experts, out, in]`, or if transposed `[experts, in, out]`.
    """

    name = ""

    def __init__(
        self,
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor] | None,
        transposed: bool,
        kernels: KernelDispatch | None = None,
    ) -> None:
        self.kernels = kernels or KernelDispatch()
        axis = 1 if transposed else 2
        both = torch.stack(weights, dim=axis)
        concatenated = both.flatten(axis, axis + 1)
        self.concatenated = concatenated.mT if transposed else concatenated  # [experts, out, 2·in]
        low, high = both.select(axis, INSTRUCT), both.select(axis, THINKING)
        self.endpoints = (low.mT, high.mT) if transposed else (low, high)
        self.biases = stacked_biases(biases)

    @property
    def instruct(self) -> Tensor:
        return self.endpoints[INSTRUCT]

    @property
    def parameters(self) -> int:
        """The number of parameters of both endpoints."""
        return self.concatenated.numel()

    @property
    def nbytes(self) -> int:
        return self.concatenated.nbytes

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """Returns Θ(λ) `[experts, out, in]`, laid out in memory as the endpoints are."""
        return torch.lerp(*self.endpoints, value, out=out)

    def product(self, expert: int, x: Tensor, rows: Rows, mix: Tensor) -> Tensor:
        """Multiplies `x` `[rows, in]` by one expert's matrix; returns `[rows, out]`.

        `mix` is `[rows or 1, 2, 1]`: (1−λ) and λ of each row.
        """
        if rows.endpoint is not None:
            out = F.linear(x, self.endpoints[rows.endpoint][expert])
        elif rows.blend is not None:
            out = F.linear(x, rows.blend.get(self)[expert])
        else:
            out = F.linear(scaled_pair(x, mix), self.concatenated[expert])
        return add_expert_bias(out, self.biases, expert, rows, mix)

    def operands(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns what a kernel reads for the step's way: matrix, second matrix, scales."""
        if rows.endpoint is not None:
            return self.endpoints[rows.endpoint], None, None
        if rows.blend is not None:
            return rows.blend.get(self), None, None
        return (*self.endpoints, None)


def stacked_biases(biases: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Stacks both endpoints' biases `[experts, out]` to `[experts, 2, out]`."""
    return None if biases is None else torch.stack(biases, dim=1)


def add_expert_bias(
    out: Tensor, biases: Tensor | None, expert: int, rows: Rows, mix: Tensor
) -> Tensor:
    """Returns `out` `[rows, out]` plus the expert's bias, blended for each row."""
    if biases is None:
        return out
    if rows.endpoint is not None:
        return out + biases[expert, rows.endpoint]
    return out + (mix * biases[expert]).sum(1).to(out.dtype)


def detached_from_file(tensor: Tensor) -> Tensor:
    """Copies a tensor of a mapped file, which would keep the entire file mapped."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


@dataclass(frozen=True, slots=True)
class PairStorage:
    """Stores both endpoints in full."""

    kernels: KernelDispatch = field(default_factory=KernelDispatch)

    @property
    def endpoints(self) -> Mapping[float, int]:
        return ENDPOINTS

    def matrix(self, instruct: Tensor, thinking: Tensor) -> PairMatrix:
        return PairMatrix(instruct, thinking, self.kernels)

    def vocabulary(self, instruct: Tensor, thinking: Tensor) -> VocabularyPair:
        return VocabularyPair(
            detached_from_file(instruct), detached_from_file(thinking), self.kernels
        )

    def experts(
        self, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor] | None, transposed: bool
    ) -> PairExperts:
        return PairExperts(weights, biases, transposed, self.kernels)
