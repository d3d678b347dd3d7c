"""The model's forward compiled by `torch.compile`: norms, rotary embedding, activations, residuals
and the blending of small parameters become few kernels, between the products and the attention.

Compiled once for each way, with the number of rows left open, for the rows that `BlendGroups.hold`
has set. Only decode steps that are recorded run compiled: there nothing of it is left at run time
but its kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mi_runtime.load import BlendedModel

FORWARDS = 16  # forwards compiled of one model: one a way, and room for sizes that need their own


def compiled_logits(
    model: BlendedModel, backend: str = "inductor"
) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
    """`model.logits`, compiled at its first call for each way.

    Raises at that call what torch raises for a model that it cannot compile whole.
    """
    forward = torch.compile(model.forward, fullgraph=True, backend=backend)

    def logits(ids: Tensor, positions: Tensor, kept: Tensor, attention: Any) -> Tensor:
        for rows in (ids, positions, kept, *model.groups.lambdas, *attention.row_tensors):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        with torch._dynamo.config.patch(recompile_limit=FORWARDS):
            result = forward(ids, positions, kept, attention)
        model.groups.end()
        return result

    return logits
