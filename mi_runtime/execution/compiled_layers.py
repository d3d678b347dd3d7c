"""Compiles decoder layers with `torch.compile`, for the decode steps that are captured.

Norms, rotary embedding, activations, residuals and the blends of small parameters become a few
kernels between the matrix products and attention. A layer is compiled once for each way and each
kind of layer (with or without a sliding window, dense or of experts), with a dynamic number of
rows, for the rows that `BlendGroups.set_rows` has set. All layers of a kind share the compiled
code, so it must not depend on the layer's number. Embedding, last norm and head are not compiled.
Only captured decode steps run compiled: a CUDA graph replays the kernels without any guard or other
host code of the compiler.
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

MAX_COMPILED = 64  # compiled layers of one model: by kind and way, some for special row counts

Layer = Callable[..., Any]


def compiled_logits(model: BlendedModel, backend: str = "inductor") -> Forward:
    """Returns `model.logits` with compiled layers; the first call for each way compiles them.

    That call raises what torch raises for a layer that it cannot compile as one graph.
    """
    # Torch counts compilations by code object, so each model gets a code object of its own.
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
            torch._dynamo.config.patch(recompile_limit=MAX_COMPILED),
            _layers_run_by(compiled, model, attention),
        ):
            result = forward_logits(model.model, ids, positions, logits_indices, attention)
        model.groups.end()
        return result

    return logits


def _layer(layer: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """Calls the `forward` of the layer's class, which the instance attribute `forward` hides."""
    return type(layer).forward(layer, *inputs, **settings)


@contextmanager
def _layers_run_by(run: Layer, model: BlendedModel, attention: PagedAttention) -> Iterator[None]:
    """Inside the context, runs every decoder layer of the model through `run`."""
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
        _mark_dynamic(tensors, axis=1)  # axis 0 is the batch, of size 1
        return run(layer, *inputs, **settings)

    return forward


def _mark_dynamic(tensors: Any, axis: int) -> None:
    """Tells the compiler that this axis varies from call to call."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
