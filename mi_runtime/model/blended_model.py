"""A loaded pair as one model, with its properties and its forward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mi_runtime.attention.plan import LayerShape
from mi_runtime.kernels.dispatch import KernelDispatch
from mi_runtime.model.row_lambdas import BlendGroups


@dataclass(frozen=True, slots=True)
class BlendedModel:
    """A model in which every row has its own λ, and what an engine needs to know about it."""

    model: PreTrainedModel
    groups: BlendGroups
    layers: tuple[LayerShape, ...]
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    weight_bytes: int  # of both endpoints, as they are stored
    peak_bytes: int  # most memory held while loading, without pages of mapped files
    load_seconds: float
    identity: str  # hex digest of configs and weights; any name for a pair without files
    max_positions: int  # tokens of context that both endpoints support
    kernels: KernelDispatch = field(default_factory=KernelDispatch)

    @torch.inference_mode()
    def logits(
        self, ids: Tensor, positions: Tensor, logits_indices: Tensor, attention: Any
    ) -> Tensor:
        """Returns the logits `[rows with logits, vocabulary]` of a flat batch.

        `ids` and `positions` are `[tokens]` int64, `logits_indices` the rows that need logits.
        """
        logits = forward_logits(self.model, ids, positions, logits_indices, attention)
        self.groups.end()
        return logits


def forward_logits(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, logits_indices: Tensor, attention: Any
) -> Tensor:
    """Computes `BlendedModel.logits` for a plain model, as a function that can be compiled."""
    output = model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        logits_to_keep=logits_indices,
        attention_context=attention,
    )
    logits: Tensor = output.logits[0]
    return logits
