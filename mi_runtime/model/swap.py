"""Replaces the modules of an Instruct model by pair modules, in place.

It moves the tensors out of both models. A module with parameters is either supported or refused by
name. Names decide the blend group: in `layers.N`, whatever belongs to `self_attn` and the norm
before it are `N.attn`, and the rest is `N.mlp`; outside the layers, the embedding is `embed`, and
the final norm and the head are `head`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mi_runtime.errors import UnsupportedModel
from mi_runtime.model.pair_modules import (
    EXPERT_ATTRIBUTES,
    PairEmbedding,
    PairLayerNorm,
    PairLinear,
    RoutedWeight,
    RowParameter,
)
from mi_runtime.model.row_lambdas import BlendGroups, RowSlot
from mi_runtime.model.weights import Matrix, PairMatrix, Storage, VocabularyMatrix

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")
EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")  # as in EXPERT_ATTRIBUTES
ATTENTION_PARTS = ("self_attn", "input_layernorm", "post_self_attn_layernorm")


def group_of(name: str) -> str:
    """Returns the blend group of a module or parameter by its name in the model."""
    found = LAYER.search(name)
    if found:
        part = "attn" if found[2].startswith(ATTENTION_PARTS) else "mlp"
        return f"{found[1]}.{part}"
    return "embed" if "embed" in name else "head"


def _name_in_layer(name: str) -> str:
    """Returns a module's name within its layer, or its full name outside the layers."""
    found = LAYER.search(name)
    return found[2] if found else name


@dataclass(frozen=True, slots=True)
class RowAxis:
    """Which axis of a module's input is the rows of the batch, recorded by the probe."""

    axis: int
    dims: int  # of the input
    logits_only: bool  # the rows are those with logits, not all tokens
    source: int | None = None  # identifies the input tensor: modules that read it share it


@dataclass(frozen=True, slots=True)
class _Both:
    """The same module in both models."""

    name: str
    instruct: nn.Module
    thinking: nn.Module


class ModuleSwap:
    """Replaces the modules of the Instruct model by pair modules.

    Raises UnsupportedModel, with the module's name, for a module with parameters that is not
    supported, or whose row axis the probe could not determine.
    """

    def __init__(self, groups: BlendGroups, axes: dict[str, RowAxis], storage: Storage) -> None:
        self._groups = groups
        self._axes = axes
        self._storage = storage
        self._vocabulary: dict[
            int, VocabularyMatrix
        ] = {}  # by identity, so that tied ones stay shared
        self._classes: dict[object, type[nn.Module]] = {}
        self._siblings: dict[str, list[_Both]] = {}

    def swap(self, instruct: nn.Module, thinking: nn.Module) -> Iterator[None]:
        """Replaces one module per iteration, so that the caller can measure memory in between."""
        self._siblings = self._find_siblings(instruct, thinking)
        for name, module in list(instruct.named_modules()):
            other = thinking.get_submodule(name)
            _check_constant_buffers(name, module, other)
            if _own_tensors(module):
                self._swap_module(name, module, other)
            yield
        left = [name for name, _ in instruct.named_parameters()]
        assert not left, f"parameters not swapped: {left}"

    def _swap_module(self, name: str, module: nn.Module, other: nn.Module) -> None:
        match module:
            case nn.Linear() if _is_linear(module):
                self._swap_linear(name, module, other)
            case nn.Embedding():
                self._swap_embedding(name, module, other)
            case nn.LayerNorm():
                self._swap_layer_norm(name, module, other)
            case _ if hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate"):
                self._swap_experts(name, module, other)
            case _:
                self._swap_parameters(name, module, other)

    def _find_siblings(self, instruct: nn.Module, thinking: nn.Module) -> dict[str, list["_Both"]]:
        """Returns, by name, the linear modules of one parent that read the same tensor."""
        found: dict[object, list[_Both]] = {}
        for name, module in instruct.named_modules():
            axis = self._axes.get(name)
            if axis and axis.source is not None and _is_linear(module) and group_of(name) != "head":
                key = name.rpartition(".")[0], axis.source
                found.setdefault(key, []).append(_Both(name, module, thinking.get_submodule(name)))
        return {one.name: siblings for siblings in found.values() for one in siblings}

    def _swap_linear(self, name: str, module: nn.Module, other: nn.Module) -> None:
        """Replaces a linear module together with those that read its input and share its matrix.

        When `swap` comes to these others, they have no parameters left.
        """
        slot, axis = self._slot(name)
        if axis.axis != axis.dims - 2:
            raise UnsupportedModel(f"{name}: its input has rows on axis {axis.axis}")
        siblings = self._siblings.get(name) or [_Both(name, module, other)]
        if group_of(name) == "head":
            pair: Matrix = self._take_vocabulary(module, other)
        else:
            pair = self._storage.matrix(*_take_joined_weights(siblings))
        pair.name = _name_in_layer(name)
        first = 0
        for one in siblings:
            last = first + cast(nn.Linear, one.instruct).out_features
            bias = _take(one.instruct, one.thinking, "bias")
            one.instruct.__class__ = PairLinear
            swapped = cast(PairLinear, one.instruct)
            swapped.pair, swapped.slot = pair, slot
            swapped.columns = slice(first, last) if len(siblings) > 1 else None
            swapped.sharers = len(siblings)
            swapped.pair_bias = None if bias is None else RowParameter(*bias, slot)
            first = last

    def _swap_embedding(self, name: str, module: nn.Embedding, other: nn.Module) -> None:
        if module.max_norm is not None:
            raise UnsupportedModel(f"{name}: an embedding with max_norm")
        pair = self._take_vocabulary(module, other)
        if type(module) is nn.Embedding:
            module.__class__ = PairEmbedding
        else:
            self._change_class(module, base=PairEmbedding)
        swapped = cast(PairEmbedding, module)
        swapped.pair, swapped.slot = pair, self._groups.slot(group_of(name), logits_only=False)

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
        for projection, attribute in zip(EXPERT_PROJECTIONS, EXPERT_ATTRIBUTES, strict=True):
            weights = _take(module, other, projection)
            assert weights is not None
            biases = _take(module, other, f"{projection}_bias") if flags.has_bias else None
            experts = self._storage.experts(weights, biases, flags.is_transposed)
            experts.name = f"{_name_in_layer(name)}.{projection}"
            setattr(module, attribute, experts)
        flags.slot = self._groups.slot(group_of(name), logits_only=False)
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
            matrix = PairMatrix(*taken)
            matrix.name = _name_in_layer(name)
            weight = RoutedWeight(matrix, self._slot(name)[0], taken[0].dtype)
            return lambda: weight
        if is_router or kind.endswith("Norm"):
            return self._row_parameter(name, *taken).value
        if parameter == "sinks":
            return RowParameter(*taken, self._groups.slot(group_of(name), logits_only=False)).value
        raise UnsupportedModel(f"{name}.{parameter}: no swap covers this part of {kind}")

    def _row_parameter(self, name: str, instruct: Tensor, thinking: Tensor) -> RowParameter:
        slot, axis = self._slot(name)
        between = axis.dims - axis.axis - 1 - instruct.dim()
        if between < 0:
            raise UnsupportedModel(f"{name}: a parameter of shape {tuple(instruct.shape)}")
        return RowParameter(instruct, thinking, slot, between)

    def _slot(self, name: str) -> tuple[RowSlot, RowAxis]:
        if name not in self._axes:
            raise UnsupportedModel(f"{name}: the probe could not determine its rows")
        axis = self._axes[name]
        return self._groups.slot(group_of(name), axis.logits_only), axis

    def _take_vocabulary(self, module: nn.Module, other: nn.Module) -> VocabularyMatrix:
        key = id(module.get_parameter("weight"))
        taken = _take_weight(module, other)
        if key not in self._vocabulary:
            self._vocabulary[key] = self._storage.vocabulary(*taken)
        return self._vocabulary[key]

    def _change_class(
        self,
        module: nn.Module,
        properties: tuple[str, ...] = (),
        base: type[nn.Module] | None = None,
    ) -> None:
        """Changes the class of `module` to a subclass of it, with `base` next in the MRO."""
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
    """Returns the checkpoint tensors that belong to this module itself."""
    return [*module.named_parameters(recurse=False), *_persistent_buffers(module)]


def _check_constant_buffers(name: str, module: nn.Module, other: nn.Module) -> None:
    """Raises UnsupportedModel if a buffer that is in no checkpoint differs."""
    for buffer_name in module._non_persistent_buffers_set:
        mine, theirs = module._buffers[buffer_name], other._buffers[buffer_name]
        if (mine is None) != (theirs is None) or (
            mine is not None
            and theirs is not None
            and not torch.equal(mine, theirs.to(mine.device))
        ):
            raise UnsupportedModel(f"{name}.{buffer_name} differs between the endpoints")


def _take(module: nn.Module, other: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """Removes a tensor from both modules and returns both, on the first one's device.

    Returns None if there is no such tensor.
    """
    taken = []
    for owner in (module, other):
        store: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        tensor = store.pop(name, None)
        if tensor is None:
            return None
        taken.append(tensor.detach())
    return taken[0], taken[1].to(taken[0].device)


def _take_weight(module: nn.Module, other: nn.Module) -> tuple[Tensor, Tensor]:
    taken = _take(module, other, "weight")
    assert taken is not None
    return taken


def _take_joined_weights(modules: list[_Both]) -> tuple[Tensor, Tensor]:
    """Takes the weights of linear modules that read one input, concatenated by rows."""
    taken = [_take_weight(one.instruct, one.thinking) for one in modules]
    if len(taken) == 1:
        return taken[0]
    instruct, thinking = zip(*taken, strict=True)
    return torch.cat(instruct), torch.cat(thinking)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _refuse_rest(name: str, module: nn.Module) -> None:
    """Raises UnsupportedModel if the module has any tensor left."""
    for parameter, _ in _own_tensors(module):
        raise UnsupportedModel(f"{name}.{parameter}: no swap covers this part")
