"""The paged KV cache of a model, and the attention function registered with `transformers`.

`PagedAttention` owns the KV tensors of all layers and the plan of the running step. It passes each
layer's call to the attention backend that start-up selected.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mi_runtime.attention.plan import AttentionBackend, AttentionPlan, LayerShape
from mi_runtime.attention.reference import ReferenceAttention
from mi_runtime.errors import UnsupportedModel

ATTENTION_NAME = "mi_paged"


class AttentionContext(Protocol):
    """What a model's forward pass gives its attention layers as `attention_context`."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attends with tensors `[tokens, heads, dim]`; returns the same shape.

        `window` counts the token itself.
        """
        ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_context: AttentionContext,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls, registered as `ATTENTION_NAME`.

    Inputs are `[1, heads, tokens, dim]`, the output `[1, tokens, heads, dim]`. Raises
    UnsupportedModel for arguments that the attention backends cannot compute.
    """
    unsupported = sorted(name for name in _MEANINGFUL if others.get(name) is not None)
    if unsupported or attention_mask is not None:
        what = ", ".join(unsupported) or "a custom attention mask"
        raise UnsupportedModel(f"attention with {what} is not supported")
    out = attention_context.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling,
        window=sliding_window,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


# Keyword arguments of attention functions that would change the result.
_MEANINGFUL = {
    "softcap",
    "position_bias",
    "head_mask",
    "indexer",
    "block_mask",
    "cache_position_bias",
}


class PagedAttention:
    """The KV cache of all layers, and attention over it by the plan of the running step."""

    def __init__(
        self,
        shapes: tuple[LayerShape, ...],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.block_size = block_size
        self.null_block = num_blocks
        self.backend = backend or ReferenceAttention()

        def cache(shape: LayerShape, dim: int) -> Tensor:
            size = (num_blocks + 1, block_size, shape.kv_heads, dim)
            return torch.zeros(size, dtype=dtype, device=device)

        self._keys = [cache(shape, shape.key_dim) for shape in shapes]
        self._values = [cache(shape, shape.value_dim) for shape in shapes]
        self.plan: AttentionPlan | None = None

    @property
    def caches(self) -> tuple[Tensor, ...]:
        """The keys of every layer, then the values of every layer, each `[blocks + 1, …]`."""
        return *self._keys, *self._values

    def begin(self, plan: AttentionPlan) -> None:
        """Sets the plan of the next forward pass."""
        self.plan = plan

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        attention = self.of_layer(layer)
        return attention.attend(layer, query, key, value, scale=scale, window=window, sinks=sinks)

    def of_layer(self, layer: int) -> "LayerAttention":
        """Returns what one layer needs for the next forward pass."""
        assert self.plan is not None
        return LayerAttention(self.backend, self.plan, self._keys[layer], self._values[layer])


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The KV cache of one layer, and the plan of one step.

    A compiled layer knows no more of attention than this, and never which layer it is, so that all
    layers share the compiled code.
    """

    backend: AttentionBackend
    plan: AttentionPlan
    keys: Tensor
    values: Tensor

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.backend.write(self.plan, self.keys, self.values, key, value)
        return self.backend.attend(
            self.plan, query, self.keys, self.values, scale=scale, window=window, sinks=sinks
        )
