"""The modules that replace those of a `transformers` model, and compute with both endpoints.

Linear, embedding and LayerNorm modules become the subclasses here. Other norms and elementwise
parameters become properties that return the blend for the rows of the running step, so that the
class's own `forward` runs unchanged. A module finds the rows of the running step, and the way to
compute them, in its `RowSlot`. Linear modules that read the same input share one matrix and one
product.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_runtime.errors import UnsupportedModel
from mi_runtime.model.row_lambdas import INSTRUCT, RowSlot, scaled_pair
from mi_runtime.model.weights import ExpertMatrices, Matrix, PairMatrix, VocabularyMatrix, Weights

EXPERT_ATTRIBUTES = ("pair_gate_up", "pair_down")  # attributes of a swapped experts module


class RowParameter:
    """A parameter used elementwise (norm weight, bias, sinks), blended for each row.

    `axes` is the number of dimensions between the row axis of the module's input and the
    parameter's own dimensions: 0 for `[rows, dim]`, 1 for `[rows, heads, dim]` with `[dim]`.
    """

    def __init__(self, instruct: Tensor, thinking: Tensor, slot: RowSlot, axes: int = 0) -> None:
        self.endpoints = (instruct.clone(), thinking.clone())
        self.slot = slot
        self._lambda_shape = (-1,) + (1,) * (axes + instruct.dim())
        shape = (1,) * axes + tuple(instruct.shape)
        # They are small, and otherwise each replay would convert them again.
        low, high = (side.float().view(shape) for side in self.endpoints)
        self._wide = (low, high)

    def value(self) -> Tensor:
        """Returns the parameter at an endpoint, else its blend `[rows or 1, 1…, *shape]`."""
        rows = self.slot.rows
        if rows.endpoint is not None:
            return self.endpoints[rows.endpoint]
        return rows.derived(self, self._blend_rows)

    def _blend_rows(self, lambdas: Tensor) -> Tensor:
        blend = torch.lerp(*self._wide, lambdas.view(self._lambda_shape))
        return blend.to(self.endpoints[INSTRUCT].dtype)


class RoutedWeight:
    """Replaces a router's `weight`: `F.linear` with it computes the product by the step's way.

    Routers call `F.linear(x, self.weight)` in their own `forward`, some after a cast. Torch's
    `__torch_function__` protocol makes that line work unchanged. Any other use raises
    UnsupportedModel.
    """

    def __init__(self, matrix: PairMatrix, slot: RowSlot, dtype: torch.dtype) -> None:
        self._matrix, self._slot, self.dtype = matrix, slot, dtype

    def type(self, dtype: torch.dtype) -> "RoutedWeight":
        return RoutedWeight(self._matrix, self._slot, dtype)

    to = type

    def float(self) -> "RoutedWeight":
        return self.type(torch.float32)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        if func is not F.linear:
            raise UnsupportedModel(f"a router uses its weight in {func.__name__}")
        x, weight, *bias = args
        out = cast(RoutedWeight, weight)._product(x)
        bias = bias[0] if bias else (kwargs or {}).get("bias")
        return out if bias is None else out + bias

    def _product(self, x: Tensor) -> Tensor:
        rows, matrix = self._slot.rows, self._matrix
        if rows.endpoint is not None:
            return F.linear(x, matrix.endpoints[rows.endpoint].to(self.dtype))
        if rows.blend is not None:
            return F.linear(x, rows.blend.get(matrix).to(self.dtype))
        return F.linear(scaled_pair(x, rows.mix), matrix.concatenated.to(self.dtype))


class PairLinear(nn.Linear):
    """`nn.Linear` over both endpoints. A module becomes one when its class is changed."""

    pair: Matrix
    columns: slice | None  # this module's columns of a product that it shares with others
    sharers: int  # modules that share the matrix, including this one
    pair_bias: RowParameter | None
    slot: RowSlot

    def forward(self, input: Tensor) -> Tensor:
        rows = self.slot.rows
        if self.columns is None:
            out = self.pair.product(input, rows)
        else:
            out = rows.shared(self.pair, input, self.sharers)[..., self.columns]
        return out if self.pair_bias is None else out + self.pair_bias.value()


class PairEmbedding(nn.Embedding):
    """`nn.Embedding` over both endpoints; subclasses that scale the output inherit from it."""

    pair: VocabularyMatrix
    slot: RowSlot

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # scaling subclasses read its dtype
        return self.pair.instruct

    def forward(self, input: Tensor) -> Tensor:
        return self.pair.lookup(input, self.slot.rows)


class PairLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose weight and bias are blended row by row, in fp32."""

    pair_weight: RowParameter | None
    pair_bias: RowParameter | None

    def forward(self, input: Tensor) -> Tensor:
        out = F.layer_norm(input.float(), self.normalized_shape, eps=self.eps)
        if self.pair_weight is not None:
            out = out * self.pair_weight.value()
        if self.pair_bias is not None:
            out = out + self.pair_bias.value()
        return out.to(input.dtype)


class _Experts(Protocol):
    """A swapped experts module, of a class that uses `use_experts_implementation`."""

    has_bias: bool
    pair_gate_up: ExpertMatrices
    pair_down: ExpertMatrices
    slot: RowSlot

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def weights_of(model: nn.Module) -> set[Weights]:
    """Returns all weights that a blend materializes, each once."""
    found: set[Weights] = set()
    for module in model.modules():
        if isinstance(module, PairLinear):
            found.add(module.pair)
        found |= {vars(module)[name] for name in EXPERT_ATTRIBUTES if name in vars(module)}
    return found


def pair_experts_forward(
    module: nn.Module, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    """Computes a mixture of experts over both endpoints, each row with its own λ.

    `transformers` calls it with `hidden` `[rows, dim]` and `expert_ids` and `expert_weights`
    `[rows, k]`. Returns `[rows, dim]`.
    """
    experts = cast(_Experts, module)
    by_kernel = experts.pair_gate_up.kernels.experts
    compute = _experts_by_kernel if by_kernel else _experts_one_by_one
    out = compute(experts, hidden, expert_ids)  # [rows · k, dim]
    weighted = out * expert_weights.reshape(-1, 1)
    return weighted.view(*expert_ids.shape, -1).sum(1).to(hidden.dtype)


def _experts_by_kernel(experts: _Experts, hidden: Tensor, expert_ids: Tensor) -> Tensor:
    """Computes all experts in two launches, without waiting for the device."""
    first, second, rows = experts.pair_gate_up, experts.pair_down, experts.slot.rows
    kernels = first.kernels
    alignment = kernels.align(expert_ids, len(first.instruct))
    gate_up = kernels.grouped(
        hidden, first.operands(rows), first.biases, rows.lambdas, alignment, gather=True
    )
    gated = experts._apply_gate(gate_up)
    return kernels.grouped(
        gated, second.operands(rows), second.biases, rows.lambdas, alignment, gather=False
    )


def _experts_one_by_one(experts: _Experts, hidden: Tensor, expert_ids: Tensor) -> Tensor:
    """Computes one product per chosen expert on any device; the host reads which are chosen."""
    rows = experts.slot.rows
    order = expert_ids.flatten().argsort(stable=True)
    source = order // expert_ids.shape[1]
    sizes = torch.bincount(expert_ids.flatten()).tolist()
    out = torch.empty(len(order), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    first = 0
    for expert, size in enumerate(sizes):
        if not size:
            continue
        mine = source[first : first + size]
        mix = rows.mix if len(rows.mix) == 1 else rows.mix[mine]
        gate_up = experts.pair_gate_up.product(expert, hidden[mine], rows, mix)
        down = experts.pair_down.product(expert, experts._apply_gate(gate_up), rows, mix)
        out[order[first : first + size]] = down
        first += size
    return out
