"""The pair of weights under one model: what each swapped module computes with.

A layer is linear in its weights, so for a row x with its own λ

    W(λ) x = (1−λ) W_I x + λ W_T x = [W_I | W_T] · [(1−λ)x ; λx]

and one product over concatenated inputs serves any mixture of λ values exactly, without forming
W(λ). A pair of matrices is stored once as `[out, 2, in]`: flattened it is the concatenated matrix,
each endpoint is a strided view of it, and a blend is one `torch.lerp` of the views: that computes
in fp32 whatever the dtype, rounds once, and holds nothing beside its result.

    way        rows                  reads             multiply-adds
    endpoint   all at λ=0, or at 1   2P bytes          R·P
    blended    all at one λ          2P bytes          R·P      (4P read + 2P written, once)
    pair       any                   4P bytes          2·R·P    (P parameters of 2 bytes, R rows)

Which way a module goes is in its `RowSlot`. Linear and embedding modules are swapped by subclasses,
norms and other elementwise parameters by a property that yields the blend for the rows, so that
every class's own forward runs untouched.

Modules that read one input share one matrix, and one product. On a GPU, products of few rows and
those of experts go by the kernels that a matrix was given (`mi_runtime/kernels/`).

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

VOCABULARY_PIECE = 16384  # tokens whose logits are blended at once: bounds the fp32 copies


class Weights(Blendable, Protocol):
    """Weights at every λ, however both endpoints are kept."""

    @property
    def instruct(self) -> Tensor:
        """Of the Instruct endpoint, bit by bit: `[out, in]`, or `[experts, out, in]`."""
        ...

    @property
    def parameters(self) -> int:
        """Of both endpoints."""
        ...

    @property
    def nbytes(self) -> int:
        """What is kept of both endpoints, without biases."""
        ...


class Matrix(Weights, Protocol):
    """What a linear module computes with."""

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """`[..., rows, in]` to `[..., rows, out]`."""
        ...


class Vocabulary(Matrix, Protocol):
    """What an embedding, a head, or both of a tied model compute with."""

    def lookup(self, ids: Tensor, rows: Rows) -> Tensor:
        """Rows of the matrix by index: `ids` `[..., rows]` to `[..., rows, dim]`."""
        ...


class ExpertMatrices(Weights, Protocol):
    """What one projection of all experts computes with."""

    kernels: KernelDispatch

    @property
    def biases(self) -> Tensor | None:
        """`[experts, 2, out]` of both endpoints, where there are any."""
        ...

    def operands(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the step's way reads, as a kernel takes it: matrix, second matrix, scales."""
        ...

    def product(self, expert: int, x: Tensor, rows: Rows, mix: Tensor) -> Tensor:
        """`[rows, in]` through one expert to `[rows, out]`; `mix` is `[rows or 1, 2, 1]`."""
        ...


class Storage(Protocol):
    """How the large matrices of a pair are kept. The tensors it is given are its own to keep."""

    @property
    def endpoints(self) -> Mapping[float, int]:
        """The λ values whose weights are had as they were loaded, and which endpoint each is."""
        ...

    def matrix(self, instruct: Tensor, thinking: Tensor) -> Matrix: ...

    def vocabulary(self, instruct: Tensor, thinking: Tensor) -> Vocabulary: ...

    def experts(
        self, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor] | None, transposed: bool
    ) -> ExpertMatrices:
        """Of weights `[experts, out, in]`, or transposed `[experts, in, out]`."""
        ...


class PairMatrix:
    """Both endpoints' `[out, in]` matrices in one `[out, 2, in]` tensor."""

    name = ""

    def __init__(
        self, instruct: Tensor, thinking: Tensor, kernels: KernelDispatch | None = None
    ) -> None:
        self.kernels = kernels or KernelDispatch()
        both = torch.stack((instruct, thinking), dim=1)
        self.concatenated = both.flatten(1)  # [out, 2·in]
        self.endpoints = (both[:, INSTRUCT], both[:, THINKING])  # strided views

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        return torch.lerp(*self.endpoints, value, out=out)

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """`[..., rows, in]` to `[..., rows, out]`."""
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
        """Of both endpoints."""
        return self.concatenated.numel()

    @property
    def nbytes(self) -> int:
        return self.concatenated.nbytes


class VocabularyPair:
    """Both endpoints' `[vocabulary, dim]` matrices as they were loaded: embedding, head, or both.

    The largest matrices of a model stay apart, so that loading never copies them; for the rows
    that reach the head, two products and a lerp cost the same as one product over `2·dim`. They
    are made piece by piece: of 512 scored positions, both and their fp32 copies are over a GB.
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
        """Of both endpoints."""
        return 2 * self.instruct.numel()

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.endpoints)

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        return torch.lerp(*self.endpoints, value, out=out)

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """`[..., rows, dim]` to `[..., rows, vocabulary]`."""
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
            own = F.linear(x, low[piece]), F.linear(x, high[piece])
            out[..., piece] = _lerp_rows(*own, rows)
        return out

    def lookup(self, ids: Tensor, rows: Rows) -> Tensor:
        """Rows of the matrix by index: `ids` `[..., rows]` to `[..., rows, dim]`.

        Never from a blended matrix: blending the rows looked up costs less than reading it once.
        """
        if rows.endpoint is not None:
            return F.embedding(ids, self.endpoints[rows.endpoint])
        low, high = self.endpoints
        return _lerp_rows(F.embedding(ids, low), F.embedding(ids, high), rows)


def _lerp_rows(instruct: Tensor, thinking: Tensor, rows: Rows) -> Tensor:
    """Row by row between two results `[..., rows, any]`, in fp32, rounded once."""
    blend = torch.lerp(instruct.float(), thinking.float(), rows.lambdas.unsqueeze(-1))
    return blend.to(instruct.dtype)


class PairExperts:
    """One projection of all experts: `[experts, out, in]`, or transposed `[experts, in, out]`."""

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
        """Of both endpoints."""
        return self.concatenated.numel()

    @property
    def nbytes(self) -> int:
        return self.concatenated.nbytes

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """`[experts, out, in]`, laid out as the endpoints are."""
        return torch.lerp(*self.endpoints, value, out=out)

    def product(self, expert: int, x: Tensor, rows: Rows, mix: Tensor) -> Tensor:
        """`[rows, in]` through one expert to `[rows, out]`; `mix` is `[rows or 1, 2, 1]`."""
        if rows.endpoint is not None:
            out = F.linear(x, self.endpoints[rows.endpoint][expert])
        elif rows.blend is not None:
            out = F.linear(x, rows.blend.get(self)[expert])
        else:
            out = F.linear(scaled_pair(x, mix), self.concatenated[expert])
        return add_expert_bias(out, self.biases, expert, rows, mix)

    def operands(self, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if rows.endpoint is not None:
            return self.endpoints[rows.endpoint], None, None
        if rows.blend is not None:
            return rows.blend.get(self), None, None
        return (*self.endpoints, None)


def stacked_biases(biases: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Both endpoints' `[experts, out]` as `[experts, 2, out]`."""
    return None if biases is None else torch.stack(biases, dim=1)


def add_expert_bias(
    out: Tensor, biases: Tensor | None, expert: int, rows: Rows, mix: Tensor
) -> Tensor:
    """`out` `[rows, out]` with each row's own blend of the expert's biases, where there are any."""
    if biases is None:
        return out
    if rows.endpoint is not None:
        return out + biases[expert, rows.endpoint]
    return out + (mix * biases[expert]).sum(1).to(out.dtype)


def detached_from_file(tensor: Tensor) -> Tensor:
    """A view of a mapped file would keep the whole file mapped: copied, it lets go of it."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


@dataclass(frozen=True, slots=True)
class WholeStorage:
    """Both endpoints whole."""

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
