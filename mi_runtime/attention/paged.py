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
    """What a model forward hands down to its attention layers as `attention_context`."""

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
        """`[tokens, heads, dim]` each, and the same out; `window` counts the token itself."""
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
    """What `transformers` calls: `[1, heads, tokens, dim]` in, `[1, tokens, heads, dim]` out."""
    unsupported = sorted(name for name in _MEANINGFUL if others.get(name) is not None)
    if unsupported or attention_mask is not None:
        raise UnsupportedModel(f"attention with {', '.join(unsupported) or 'a mask of its own'}")
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


# keyword arguments of attention functions that would change the result
_MEANINGFUL = {
    "softcap",
    "position_bias",
    "head_mask",
    "indexer",
    "block_mask",
    "cache_position_bias",
}


class PagedAttention:
    """The KV of all layers and the attention of one step over it."""

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
        """Keys, then values of each layer, `[blocks + 1, …]`."""
        return *self._keys, *self._values

    def begin(self, plan: AttentionPlan) -> None:
        """Sets how the rows of the next forward attend."""
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
        own = self.of_layer(layer)
        return own.attend(layer, query, key, value, scale=scale, window=window, sinks=sinks)

    def of_layer(self, layer: int) -> "LayerAttention":
        """What one layer needs for the next forward."""
        assert self.plan is not None
        return LayerAttention(self.backend, self.plan, self._keys[layer], self._values[layer])


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's KV, and how the rows of one step attend over it.

    It is all that a compiled layer knows of attention, and never which layer it is: so the code is
    the same for all.
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
