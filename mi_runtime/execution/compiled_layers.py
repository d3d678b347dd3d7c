"""The decoder layer compiled by `torch.compile`: norms, rotary embedding, activations, residuals
and the blends of small parameters become few kernels, between the products and the attention.

Compiled once for each way and each kind of layer (with a sliding window or without, dense or of
experts), with the number of rows left open, for the rows that `BlendGroups.set_rows` has set. All
layers of a kind share the code, so nothing that is compiled may know which layer it is. Embedding,
last norm and head run as they are. Only decode steps that are recorded run compiled: there nothing
of it is left at run time but its kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.execution.decode_graphs import Forward
from mi_runtime.model.blended_model import BlendedModel, forward_logits

LAYERS = 64  # compiled of one model: by kind and way, and some for row counts of their own

Layer = Callable[..., Any]


def compiled_logits(model: BlendedModel, backend: str = "inductor") -> Forward:
    """`model.logits` with its layers compiled, at the first call for each way.

    Raises at that call what torch raises for a layer that it cannot compile whole.
    """
    # Torch counts what it has compiled by code object: each model's is its own.
    own = FunctionType(_layer.__code__.replace(), _layer.__globals__)
    compiled = torch.compile(own, fullgraph=True, backend=backend)

    @torch.inference_mode()
    def logits(
        ids: Tensor, positions: Tensor, logits_indices: Tensor, attention: PagedAttention
    ) -> Tensor:
        assert attention.plan is not None
        _mark_dynamic((*attention.plan.by_rows, *attention.caches), axis=0)
        _mark_dynamic((rows for rows in model.groups.current_lambdas if len(rows) > 1), axis=0)
        with (
            torch._dynamo.config.patch(recompile_limit=LAYERS),
            _layers_run_by(compiled, model, attention),
        ):
            result = forward_logits(model.model, ids, positions, logits_indices, attention)
        model.groups.end()
        return result

    return logits


def _layer(layer: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """A decoder layer's own forward, which its attribute `forward` stands before."""
    return type(layer).forward(layer, *inputs, **settings)


@contextmanager
def _layers_run_by(run: Layer, model: BlendedModel, attention: PagedAttention) -> Iterator[None]:
    layers = model.model.get_decoder().layers
    for number, layer in enumerate(layers):
        layer.forward = _forward_by(run, layer, attention, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_by(run: Layer, layer: nn.Module, attention: PagedAttention, number: int) -> Layer:
    def forward(*inputs: Any, **settings: Any) -> Any:
        settings["attention_context"] = attention.of_layer(number)
        tensors = (one for one in tree_leaves((inputs, settings)) if isinstance(one, Tensor))
        _mark_dynamic(tensors, axis=1)  # of one batch
        return run(layer, *inputs, **settings)

    return forward


def _mark_dynamic(tensors: Any, axis: int) -> None:
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
