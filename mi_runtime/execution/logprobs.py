"""Computes log-probabilities of given tokens, and of the most probable ones, from logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mi_runtime.request import TokenLogprobs

SLICE: Final = 64  # rows converted to fp32 at once, to avoid a copy of all logits


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of one token per row, and of the best tokens of the row, on the device."""

    own: Tensor  # [rows] fp32: of the given tokens
    ids: Tensor  # [rows, count] int32
    best: Tensor  # [rows, count] fp32, best first

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that `read_logprobs` needs on the host."""
        return self.own, self.ids, self.best


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> RowLogprobs:
    """Returns the log-probabilities of `tokens` `[rows]`, and of the `count` best of each row.

    `logits` `[rows, vocabulary]` are the model's own, before temperature, penalties and bias; the
    softmax is in fp32. Which of several equal tokens are among the best depends on `count`.
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
    """Reads the `tensors` of a RowLogprobs from the host, and returns one value per row."""
    own, ids, best = (next(host).tolist() for _ in range(3))
    return [
        TokenLogprobs(value, tuple(zip(tokens, values, strict=True)))
        for value, tokens, values in zip(own, ids, best, strict=True)
    ]
