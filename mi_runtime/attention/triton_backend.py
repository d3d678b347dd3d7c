"""The attention backend that uses this project's Triton kernels."""

from torch import Tensor

from mi_runtime.attention.plan import AttentionPlan
from mi_runtime.kernels.paged_attention import paged_attention, write_kv


class TritonAttention:
    """Attention by the kernels of `mi_runtime.kernels.paged_attention`."""

    name = "triton"

    def write(
        self, plan: AttentionPlan, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
    ) -> None:
        write_kv(keys, values, key, value, plan.slot_mapping)

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
        out: Tensor = paged_attention(
            *(query, keys, values, plan.block_tables, plan.lengths, plan.query_starts, sinks),
            *(scale, window, plan.decodes, plan.longest_decode, plan.longest),
        )
        return out
