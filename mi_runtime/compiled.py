"""The model's forward compiled by `torch.compile`: norms, rotary embedding, activations, residuals
and the blending of small parameters become few kernels, between the products and the attention.

Compiled once for each way, with the number of rows left open, for the rows that `BlendGroups.hold`
has set. Only decode steps that are recorded run compiled: there nothing of it is left at run time
but its kernels.
"""

from types import FunctionType

import torch
from torch import Tensor

from mi_runtime.attention import PagedAttention
from mi_runtime.graphs import Forward
from mi_runtime.load import BlendedModel, forward_logits

FORWARDS = 16  # compiled of one model: one a way, and some for row counts that get their own


def compiled_logits(model: BlendedModel, backend: str = "inductor") -> Forward:
    """`model.logits`, compiled at its first call for each way.

    Raises at that call what torch raises for a model that it cannot compile whole.
    """
    # Torch counts what it has compiled by code object: each model's is its own.
    own = FunctionType(forward_logits.__code__.replace(), forward_logits.__globals__)
    forward = torch.compile(own, fullgraph=True, backend=backend)

    def logits(ids: Tensor, positions: Tensor, kept: Tensor, attention: PagedAttention) -> Tensor:
        assert attention.plan is not None
        for rows in (ids, positions, kept, *attention.plan.by_rows, *model.groups.held):
            if len(rows) > 1:
                torch._dynamo.maybe_mark_dynamic(rows, 0)
        for cache in attention.caches:  # compiled while memory is measured, with few blocks
            torch._dynamo.maybe_mark_dynamic(cache, 0)
        with torch._dynamo.config.patch(recompile_limit=FORWARDS):
            result: Tensor = forward(model.model, ids, positions, kept, attention)
        model.groups.end()
        return result

    return logits
