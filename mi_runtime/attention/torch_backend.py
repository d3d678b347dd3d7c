"""The attention backend that uses torch's own `varlen_attn` over block tables (torch >= 2.13).

It may still fail to run, since block tables need an implementation that torch does not ship
everywhere. It does not support attention sinks.
"""

import inspect

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mi_runtime.attention.plan import AttentionPlan
from mi_runtime.attention.triton_backend import TritonAttention


def torch_has_pages() -> bool:
    """Whether this torch supports block tables in `varlen_attn`."""
    return "block_table" in inspect.signature(varlen_attn).parameters


class TorchAttention(TritonAttention):
    """Attention by `varlen_attn`; the Triton kernel writes the KV."""

    name = "torch"

    def attend(
        self,
        plan: AttentionPlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        assert sinks is None
        out = varlen_attn(
            *(query, keys, values, plan.query_starts, None),
            *(plan.longest_query, plan.longest),
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # without the token itself
            enable_gqa=True,
            seqused_k=plan.lengths,
            block_table=plan.block_tables,
        )
        assert isinstance(out, Tensor)
        return out
