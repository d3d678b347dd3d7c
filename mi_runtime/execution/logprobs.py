"""Log-probabilities of given tokens and of the most probable ones, read from rows of logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mi_runtime.request import TokenLogprobs

SLICE: Final = 64  # rows turned to fp32 at once: one more copy of the logits is never held


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Of one token a row and of the row's best, still on the device."""

    own: Tensor  # [rows] fp32
    ids: Tensor  # [rows, count] int32
    best: Tensor  # [rows, count] fp32, best first

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is to be copied to the host for `read_logprobs`."""
        return self.own, self.ids, self.best


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> RowLogprobs:
    """Of `tokens` `[rows]` in the rows of `logits` `[rows, vocabulary]`, beside the best `count`.

    In fp32, of the model's own logits: temperature, penalties and bias are not in them. Which of
    equals are among the best depends on `count`.
    """
    slices = [
        _slice(rows, own, min(count, logits.shape[1]))
        for rows, own in zip(torch.split(logits, SLICE), torch.split(tokens, SLICE), strict=True)
    ]
    return RowLogprobs(*map(torch.cat, zip(*slices, strict=True)))


def _slice(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    table = logits.float().log_softmax(1)
    own = table.gather(1, tokens.unsqueeze(1)).squeeze(1)
    best = table.topk(count, dim=1)
    return own, best.indices.int(), best.values


def read_logprobs(host: Iterator[Tensor]) -> list[TokenLogprobs]:
    """One a row, of the `tensors` that come next on the host."""
    own, ids, best = (next(host).tolist() for _ in range(3))
    return [
        TokenLogprobs(value, tuple(zip(tokens, values, strict=True)))
        for value, tokens, values in zip(own, ids, best, strict=True)
    ]
