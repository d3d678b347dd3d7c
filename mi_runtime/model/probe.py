"""The probe: a small batch that every model computes at load, before and after the swap.

Before the swap it records where every module has its rows, the shape of every attention layer, and
the logits of both endpoints. After the swap the same batch, at mixed λ, must give those logits
again: a model that the swapped modules do not compute correctly is refused before it serves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from mi_runtime.attention.reference import PackedAttention
from mi_runtime.config import DeltaDtype
from mi_runtime.errors import UnsupportedModel
from mi_runtime.model.blended_model import forward_logits
from mi_runtime.model.row_lambdas import BlendGroups, StepRows
from mi_runtime.model.swap import RowAxis
from mi_runtime.request import Dial

# Largest error of the self-check relative to the largest logit (median over an endpoint's rows).
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# What rounding the difference may add for Thinking, relative to the distance of the endpoints'
# logits.
DELTA_TOLERANCE: dict[DeltaDtype, float] = {"none": 0.0, "int8": 0.1, "int4": 0.5}


def unique_tensors(*models: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters and buffers of the models, tied parameters once."""
    for model in models:
        yield from model.parameters()
        yield from model.buffers()


class Probe:
    """A small packed batch of two sequences that a model computes at load.

    Its number of tokens and its number of rows with logits are primes that no dimension of the
    model equals, so that the shape of a module's input shows its row axis.
    """

    def __init__(
        self, tokens: int, logits_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        lengths = (tokens // 2, tokens - tokens // 2)
        self.axes: dict[str, RowAxis] = {}
        self.attention = PackedAttention(lengths)
        self._read = WeakTensorKeyDictionary()  # a number for each tensor that modules read
        self._numbers = count()
        self._tokens, self._logits_rows = tokens, logits_rows
        self._ids = torch.arange(1, tokens + 1, device=device) * 7 % vocab_size
        self._positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        self._logits_indices = (
            torch.linspace(0, tokens - 1, logits_rows, device=device).round().long()
        )
        self._endpoints = (torch.arange(tokens, device=device) >= lengths[0]).long()

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> "Probe":
        """Returns a probe whose sizes differ from every dimension of the model."""
        used = {size for tensor in unique_tensors(model) for size in tensor.shape}
        used |= {value for value in model.config.to_dict().values() if isinstance(value, int)}
        free = (prime for prime in _PRIMES if prime not in used)
        logits_rows, tokens = next(free), next(free)
        return cls(tokens, logits_rows, model.config.vocab_size, model.device)

    def expected_logits(self, instruct: PreTrainedModel, thinking: PreTrainedModel) -> Tensor:
        """Returns `[2, rows with logits, vocabulary]`: the logits of Instruct, then of Thinking.

        Each model computes on its own device.
        """
        with self._recording(instruct):
            first = self._logits(instruct)
        return torch.stack((first, self._logits(thinking, thinking.device).to(first.device)))

    def check(
        self,
        blended: PreTrainedModel,
        groups: BlendGroups,
        expected: Tensor,
        dtype: torch.dtype,
        delta_dtype: DeltaDtype,
    ) -> None:
        """Checks that a batch of mixed λ gives each endpoint's own logits.

        Raises UnsupportedModel if it does not.
        """
        index, logits_indices = (
            tuple(self._endpoints.tolist()),
            tuple(self._logits_indices.tolist()),
        )
        groups.begin(StepRows((Dial(0.0), Dial(1.0)), index, logits_indices, blended=False))
        logits, of_row = self._logits(blended), self._endpoints[self._logits_indices]
        apart = (expected[0] - expected[1]).abs().amax(1)  # [logits rows]
        rounding = SELF_CHECK_TOLERANCE[dtype] * expected.abs().max()
        for value, endpoint_logits in enumerate(expected):
            allowed = rounding + value * DELTA_TOLERANCE[delta_dtype] * apart
            error = ((logits - endpoint_logits).abs().amax(1) / allowed)[of_row == value].median()
            if not error <= 1:
                raise UnsupportedModel(
                    f"the self-check failed: blended logits at λ = {value} differ by {error:.2g} "
                    "times the rounding tolerance"
                )

    def _logits(self, model: PreTrainedModel, device: torch.device | None = None) -> Tensor:
        """Returns fp32 logits of a model on `device`, by default the probe's."""
        inputs = self._ids, self._positions, self._logits_indices
        ids, positions, logits_indices = (tensor.to(device) for tensor in inputs)
        return forward_logits(model, ids, positions, logits_indices, self.attention).float()

    @contextmanager
    def _recording(self, model: nn.Module) -> Iterator[None]:
        """Records the row axis of every module's first input inside the context."""
        hooks = [
            module.register_forward_pre_hook(self._recorder(name))
            for name, module in model.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _number_of(self, tensor: Tensor) -> int:
        """Returns a number that identifies the tensor object."""
        if tensor not in self._read:
            self._read[tensor] = next(self._numbers)
        return int(self._read[tensor])

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                shape = inputs[0].shape
                for logits_only, count in ((False, self._tokens), (True, self._logits_rows)):
                    if list(shape).count(count) == 1:
                        axis = list(shape).index(count)
                        source = self._number_of(inputs[0])
                        self.axes[name] = RowAxis(axis, len(shape), logits_only, source)

        return record


_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
