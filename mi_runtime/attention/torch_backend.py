"""Paged attention by torch itself: `varlen_attn` over block tables, which torch 2.13 brought.

It may still refuse to run: paging asks for an implementation that torch does not ship everywhere.
Knows no sinks.
"""

import inspect

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mi_runtime.attention.plan import AttentionPlan
from mi_runtime.attention.triton_backend import TritonAttention


def torch_has_pages() -> bool:
    return "block_table" in inspect.signature(varlen_attn).parameters


class TorchAttention(TritonAttention):
    """The attention backend of torch; KV is written by our own kernel."""

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
