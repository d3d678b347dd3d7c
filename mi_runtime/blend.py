"""The module swap: one `transformers` model whose every row of the batch has its own λ.

A layer is linear in its weights, so for a row x with its own λ

    W(λ) x = (1−λ) W_I x + λ W_T x = [W_I | W_T] · [(1−λ)x ; λx]

and one product over concatenated inputs serves any mixture of λ values exactly, without forming
W(λ). A pair of matrices is stored once as `[out, 2, in]`: flattened it is the concatenated matrix,
and each endpoint is a strided view of it, so nothing is held twice.

    way        rows                  reads         multiply-adds
    endpoint   all at λ=0, or at 1   2P bytes      R·P
    pair       any                   4P bytes      2·R·P      (P parameters of 2 bytes, R rows)

Everything with parameters is swapped in place: linear and embedding modules by a subclass, norms
and other elementwise parameters by a property that yields the row-expanded blend, so that every
class's own forward runs untouched. A parameter that no swap covers is refused with its name.

Rejected: two separate products and a lerp (less accurate in bf16, two launches), and
`W_I + λ·(W_T − W_I)` in bf16 (misses the Thinking endpoint at λ = 1).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INSTRUCT, THINKING = 0, 1


class UnsupportedModel(ValueError):
    """A part of the model that no swap covers; the message names it."""


class RowSet:
    """The λ of the rows that a group of modules sees in the running step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.endpoint: int | None = INSTRUCT  # every row at this endpoint; None: rows differ
        self.weights = torch.zeros(0)  # [rows] fp32 λ
        self.mix = torch.zeros(0)  # [rows, 2, 1] in the model's dtype: (1−λ, λ)

    def set(self, lambdas: Tensor, endpoint: int | None) -> None:
        self.endpoint = endpoint
        if endpoint is None:
            self.weights = lambdas
            self.mix = torch.stack((1 - lambdas, lambdas), dim=1).unsqueeze(-1).to(self.dtype)


class RowLambdas:
    """λ of every row of the running step, shared by all swapped modules of one model.

    Most modules see every token of the flat batch; the head sees only the rows that are sampled.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.tokens = RowSet(dtype)
        self.kept = RowSet(dtype)

    def begin(self, lambdas: Tensor, kept: Tensor, endpoint: int | None) -> None:
        """Sets λ `[tokens]` (fp32) of this step and which of its rows (`kept`, int64) have logits.

        `endpoint` is given when every row is at λ = 0 or every row at λ = 1: they take that
        endpoint's own weights, nothing else is read, and a weight of 0 never meets an infinity.
        """
        self.tokens.set(lambdas, endpoint)
        self.kept.set(lambdas[kept], endpoint)


def common_endpoint(lambdas: Iterable[float]) -> int | None:
    """The endpoint at which all of these λ sit, if there is one."""
    distinct = set(lambdas)
    return {frozenset({0.0}): INSTRUCT, frozenset({1.0}): THINKING}.get(frozenset(distinct))


def mixed_input(x: Tensor, rows: RowSet) -> Tensor:
    """`[..., rows, in]` to `[..., rows, 2·in]`: every row times (1−λ), then every row times λ."""
    return (x.unsqueeze(-2) * rows.mix).flatten(-2)


class PairMatrix:
    """Both endpoints' `[out, in]` matrices in one `[out, 2, in]` tensor."""

    def __init__(self, instruct: Tensor, thinking: Tensor) -> None:
        both = torch.stack((instruct, thinking), dim=1)
        self.concatenated = both.flatten(1)  # [out, 2·in]
        self.endpoints = (both[:, INSTRUCT], both[:, THINKING])  # strided views

    def product(self, x: Tensor, rows: RowSet) -> Tensor:
        """`[..., rows, in]` to `[..., rows, out]`."""
        if rows.endpoint is not None:
            return F.linear(x, self.endpoints[rows.endpoint])
        return F.linear(mixed_input(x, rows), self.concatenated)

    def lookup(self, ids: Tensor, rows: RowSet) -> Tensor:
        """Rows of the matrix by index: `ids` `[..., rows]` to `[..., rows, in]`."""
        if rows.endpoint is not None:
            return F.embedding(ids, self.endpoints[rows.endpoint])
        instruct, thinking = F.embedding(ids, self.concatenated).float().chunk(2, dim=-1)
        blend = torch.lerp(instruct, thinking, rows.weights.unsqueeze(-1))
        return blend.to(self.concatenated.dtype)


class RowParameter:
    """A parameter used elementwise along rows (norm weight, bias, sinks), blended for each row.

    `axes` is the number of dimensions between the row axis of the module's input and the
    parameter's own dimensions: 0 for `[rows, dim]`, 1 for `[rows, heads, dim]` with `[dim]`.
    """

    def __init__(self, instruct: Tensor, thinking: Tensor, rows: RowSet, axes: int = 0) -> None:
        self.endpoints = (instruct.clone(), thinking.clone())
        self.rows = rows
        self._dtype = instruct.dtype
        self._pair = (instruct.float(), thinking.float())
        self._lambda_shape = (-1,) + (1,) * (axes + instruct.dim())
        self._own_shape = (1,) * axes + tuple(instruct.shape)

    def value(self) -> Tensor:
        """The parameter itself at an endpoint, else `[rows, 1…, *shape]` in its dtype."""
        if self.rows.endpoint is not None:
            return self.endpoints[self.rows.endpoint]
        instruct, thinking = (side.view(self._own_shape) for side in self._pair)
        weights = self.rows.weights.view(self._lambda_shape)
        return torch.lerp(instruct, thinking, weights).to(self._dtype)


class RoutedWeight:
    """Stands for a router's `weight`: `F.linear` with it is the pair product.

    Routers call `F.linear(x, self.weight)` inside their own forward, some after a cast; the torch
    function protocol lets that line run as it is written.
    """

    def __init__(self, matrix: PairMatrix, rows: RowSet, dtype: torch.dtype) -> None:
        self._matrix, self._rows, self.dtype = matrix, rows, dtype

    def type(self, dtype: torch.dtype) -> "RoutedWeight":
        return RoutedWeight(self._matrix, self._rows, dtype)

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
        if self._rows.endpoint is not None:
            return F.linear(x, self._matrix.endpoints[self._rows.endpoint].to(self.dtype))
        mixed = (x.unsqueeze(-2) * self._rows.mix.to(self.dtype)).flatten(-2)
        return F.linear(mixed, self._matrix.concatenated.to(self.dtype))


class PairLinear(nn.Linear):
    """`nn.Linear` over both endpoints. Made by changing a module's class, never constructed."""

    pair: PairMatrix
    pair_bias: RowParameter | None
    rows: RowSet

    def forward(self, input: Tensor) -> Tensor:
        out = self.pair.product(input, self.rows)
        return out if self.pair_bias is None else out + self.pair_bias.value()


class PairEmbedding(nn.Embedding):
    """`nn.Embedding` over both endpoints; subclasses that scale its output find it by the MRO."""

    pair: PairMatrix
    rows: RowSet

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # scaling subclasses read its dtype
        return self.pair.endpoints[INSTRUCT]

    def forward(self, input: Tensor) -> Tensor:
        return self.pair.lookup(input, self.rows)


class PairLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose affine part is blended row by row, in fp32."""

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
    """What `transformers` gives every class decorated with `use_experts_implementation`."""

    has_bias: bool
    pair_gate_up: "PairExperts"
    pair_down: "PairExperts"
    rows: RowSet

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


class PairExperts:
    """One projection of all experts: `[experts, out, in]`, or transposed `[experts, in, out]`."""

    def __init__(
        self,
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor] | None,
        transposed: bool,
    ) -> None:
        axis = 1 if transposed else 2
        both = torch.stack(weights, dim=axis)
        concatenated = both.flatten(axis, axis + 1)
        self.concatenated = concatenated.mT if transposed else concatenated  # [experts, out, 2·in]
        views = (both.select(axis, INSTRUCT), both.select(axis, THINKING))
        self.endpoints = tuple(view.mT if transposed else view for view in views)
        self.biases = None if biases is None else torch.stack(biases, dim=1)  # [experts, 2, out]

    def product(self, expert: int, x: Tensor, mix: Tensor, endpoint: int | None) -> Tensor:
        """`x` `[rows, in]` through one expert, `mix` `[rows, 2, 1]`: `[rows, out]`."""
        if endpoint is not None:
            out = F.linear(x, self.endpoints[endpoint][expert])
            return out if self.biases is None else out + self.biases[expert, endpoint]
        out = F.linear((x.unsqueeze(-2) * mix).flatten(-2), self.concatenated[expert])
        return out if self.biases is None else out + (mix * self.biases[expert]).sum(1)


def pair_experts_forward(
    module: nn.Module, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> Tensor:
    """Mixture-of-experts over both endpoints: the rows of an expert carry their own λ.

    `hidden` `[rows, dim]`, `expert_ids` and `expert_weights` `[rows, k]`; gives `[rows, dim]`.
    One product a hit expert, found on the host.
    """
    experts = cast(_Experts, module)
    endpoint, mix = experts.rows.endpoint, experts.rows.mix
    row_mix = mix  # unused at an endpoint, where `mix` is stale
    order = expert_ids.flatten().argsort(stable=True)
    rows = order // expert_ids.shape[1]
    sizes = torch.bincount(expert_ids.flatten()).tolist()
    out = torch.empty(len(order), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    first = 0
    for expert, size in enumerate(sizes):
        if not size:
            continue
        mine = rows[first : first + size]
        if endpoint is None:
            row_mix = mix[mine]
        gate_up = experts.pair_gate_up.product(expert, hidden[mine], row_mix, endpoint)
        down = experts.pair_down.product(expert, experts._apply_gate(gate_up), row_mix, endpoint)
        out[order[first : first + size]] = down
        first += size
    weighted = out * expert_weights.reshape(-1, 1)
    return weighted.view(*expert_ids.shape, -1).sum(1).to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class RowAxis:
    """Where a module's input has the rows of the flat batch, as a probe forward recorded it."""

    axis: int
    dims: int
    kept: bool  # the rows are those with logits, not all tokens


class ModuleSwap:
    """Swaps the modules of the Instruct model for pair modules, emptying both models as it goes.

    Raises UnsupportedModel with the module's name for anything with parameters that it does not
    cover, and for inputs whose row axis the probe could not tell.
    """

    def __init__(self, lambdas: RowLambdas, axes: dict[str, RowAxis]) -> None:
        self._lambdas = lambdas
        self._axes = axes
        self._matrices: dict[int, PairMatrix] = {}  # tied matrices stay shared
        self._classes: dict[object, type[nn.Module]] = {}

    def swap(self, instruct: nn.Module, thinking: nn.Module) -> None:
        for name, module in list(instruct.named_modules()):
            other = thinking.get_submodule(name)
            _check_constant_buffers(name, module, other)
            if _own_tensors(module):
                self._swap_module(name, module, other)
        left = [name for name, _ in instruct.named_parameters()]
        assert not left, f"parameters left behind: {left}"

    def _swap_module(self, name: str, module: nn.Module, other: nn.Module) -> None:
        match module:
            case nn.Linear() if type(module).forward is nn.Linear.forward:
                self._swap_linear(name, module, other)
            case nn.Embedding():
                self._swap_embedding(name, module, other)
            case nn.LayerNorm():
                self._swap_layer_norm(name, module, other)
            case _ if hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate"):
                self._swap_experts(name, module, other)
            case _:
                self._swap_parameters(name, module, other)

    def _swap_linear(self, name: str, module: nn.Module, other: nn.Module) -> None:
        rows, axis = self._rows(name)
        if axis.axis != axis.dims - 2:
            raise UnsupportedModel(f"{name}: its input has rows on axis {axis.axis}")
        pair, bias = self._take_matrix(name, module, other), _take(module, other, "bias")
        module.__class__ = PairLinear
        swapped = cast(PairLinear, module)
        swapped.pair, swapped.rows = pair, rows
        swapped.pair_bias = None if bias is None else RowParameter(*bias, rows)

    def _swap_embedding(self, name: str, module: nn.Embedding, other: nn.Module) -> None:
        if module.max_norm is not None:
            raise UnsupportedModel(f"{name}: an embedding with max_norm")
        pair = self._take_matrix(name, module, other)
        if type(module) is nn.Embedding:
            module.__class__ = PairEmbedding
        else:
            self._change_class(module, base=PairEmbedding)
        swapped = cast(PairEmbedding, module)
        swapped.pair, swapped.rows = pair, self._lambdas.tokens

    def _swap_layer_norm(self, name: str, module: nn.LayerNorm, other: nn.Module) -> None:
        for parameter in ("weight", "bias"):
            taken = _take(module, other, parameter)
            value = None if taken is None else self._row_parameter(name, *taken)
            setattr(module, f"pair_{parameter}", value)
        module.__class__ = PairLayerNorm

    def _swap_experts(self, name: str, module: nn.Module, other: nn.Module) -> None:
        flags = cast(Any, module)
        if not getattr(flags, "has_gate", True) or getattr(flags, "has_post_expert_norm", False):
            raise UnsupportedModel(f"{name}: experts of {type(module).__name__}")
        for projection, attribute in (("gate_up_proj", "pair_gate_up"), ("down_proj", "pair_down")):
            weights = _take(module, other, projection)
            assert weights is not None
            biases = _take(module, other, f"{projection}_bias") if flags.has_bias else None
            setattr(module, attribute, PairExperts(weights, biases, flags.is_transposed))
        flags.rows = self._lambdas.tokens
        _refuse_rest(name, module)

    def _swap_parameters(self, name: str, module: nn.Module, other: nn.Module) -> None:
        values = {}
        for parameter, _ in _own_tensors(module):
            taken = _take(module, other, parameter)
            assert taken is not None
            values[parameter] = self._parameter_value(name, type(module).__name__, parameter, taken)
        module.__dict__["pair_values"] = values
        self._change_class(module, tuple(values))

    def _parameter_value(
        self, name: str, kind: str, parameter: str, taken: tuple[Tensor, Tensor]
    ) -> Callable[[], Any]:
        is_router = kind.lower().endswith("router")
        if is_router and taken[0].dim() == 2:
            weight = RoutedWeight(PairMatrix(*taken), self._rows(name)[0], taken[0].dtype)
            return lambda: weight
        if is_router or kind.endswith("Norm"):
            return self._row_parameter(name, *taken).value
        if parameter == "sinks":
            return RowParameter(*taken, self._lambdas.tokens).value
        raise UnsupportedModel(f"{name}.{parameter}: no swap covers this part of {kind}")

    def _row_parameter(self, name: str, instruct: Tensor, thinking: Tensor) -> RowParameter:
        rows, axis = self._rows(name)
        between = axis.dims - axis.axis - 1 - instruct.dim()
        if between < 0:
            raise UnsupportedModel(f"{name}: a parameter of shape {tuple(instruct.shape)}")
        return RowParameter(instruct, thinking, rows, between)

    def _rows(self, name: str) -> tuple[RowSet, RowAxis]:
        if name not in self._axes:
            raise UnsupportedModel(f"{name}: a probe forward could not tell its rows")
        axis = self._axes[name]
        return (self._lambdas.kept if axis.kept else self._lambdas.tokens), axis

    def _take_matrix(self, name: str, module: nn.Module, other: nn.Module) -> PairMatrix:
        key = id(module.get_parameter("weight"))
        taken = _take(module, other, "weight")
        assert taken is not None
        if key not in self._matrices:
            self._matrices[key] = PairMatrix(*taken)
        return self._matrices[key]

    def _change_class(
        self,
        module: nn.Module,
        properties: tuple[str, ...] = (),
        base: type[nn.Module] | None = None,
    ) -> None:
        """Gives `module` a subclass of its own class, with `base` next in the MRO."""
        own = type(module)
        key = (own, properties, base)
        if key not in self._classes:
            bases = (own,) if base is None else (own, base)
            members = {parameter: _blended_property(parameter) for parameter in properties}
            self._classes[key] = type(f"Pair{own.__name__}", bases, members)
        module.__class__ = self._classes[key]


def _blended_property(parameter: str) -> property:
    return property(lambda module: module.__dict__["pair_values"][parameter]())


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a checkpoint that belong to this very module."""
    return [*module.named_parameters(recurse=False), *_persistent_buffers(module)]


def _check_constant_buffers(name: str, module: nn.Module, other: nn.Module) -> None:
    for buffer_name in module._non_persistent_buffers_set:
        mine, theirs = module._buffers[buffer_name], other._buffers[buffer_name]
        if (mine is None) != (theirs is None) or (
            mine is not None and theirs is not None and not torch.equal(mine, theirs)
        ):
            raise UnsupportedModel(f"{name}.{buffer_name} differs between the endpoints")


def _take(module: nn.Module, other: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """Removes a tensor from both modules and gives both back; None where there is none."""
    taken = []
    for owner in (module, other):
        store: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        tensor = store.pop(name, None)
        if tensor is None:
            return None
        taken.append(tensor.detach())
    return taken[0], taken[1]


def _refuse_rest(name: str, module: nn.Module) -> None:
    for parameter, _ in _own_tensors(module):
        raise UnsupportedModel(f"{name}.{parameter}: no swap covers this part")
