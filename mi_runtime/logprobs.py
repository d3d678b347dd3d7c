"""Log-probabilities of given tokens and of the most probable ones, read from rows of logits."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mi_runtime.request import TokenLogprobs

SLICE: Final = 64  # rows turned to fp32 at once: one more copy of the logits is never held


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Of `tokens[row]` in each row of `logits` `[rows, vocabulary]`, beside its best `counts[row]`.

    In fp32, of the model's own logits: temperature, penalties and bias are not in them.
    """
    out: list[TokenLogprobs] = []
    for start in range(0, len(tokens), SLICE):
        end = start + SLICE
        out += _slice(logits[start:end], tokens[start:end], counts[start:end])
    return out


def _slice(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    table = logits.float().log_softmax(1)
    own = table.gather(1, torch.tensor(tokens, device=table.device).unsqueeze(1)).squeeze(1)
    tops = {
        count: _best(table, count) for count in set(counts)
    }  # by count: which of equals are in depends on it
    return [
        TokenLogprobs(value, tops[count][row])
        for row, (value, count) in enumerate(zip(own.tolist(), counts, strict=True))
    ]


def _best(table: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` best of each row as (token id, logprob), best first."""
    best = table.topk(min(count, table.shape[1]), dim=1)
    return [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
