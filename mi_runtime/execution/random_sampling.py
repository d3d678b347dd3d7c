"""Samples rows of logits at a temperature, cut by top-k, top-p and min-p.

Rows are divided by their temperature, cut by top-k, by top-p (of the probability that top-k left)
and by min-p (relative to the best token), and sampled by inverting the cumulative distribution at
one uniform number from the sequence's own generator.

A row's token depends on its own logits and its own generator, never on the batch. Probabilities are
therefore summed as integers, in units of `UNIT`: the order in which a GPU sums floats, and so their
sum, depends on the number of rows.

A cut keeps every token of at least some probability. So tokens as probable as the last one kept are
kept as well, because the order of equal ones depends on the batch. Top-p without top-k does not
sort a large vocabulary: it sorts groups of tokens, and searches for that probability in all of them
five bits at a time.
"""

from collections.abc import Iterator
from enum import IntEnum
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_runtime.device.transfer import columns_on_device, to_index
from mi_runtime.request import SamplingParams
from mi_runtime.scheduling.sequence import Sequence

SMALLEST = 2**-126  # the smallest normal float32
UNIT = 2.0**-50  # of probability, for integer sums
SLICE = 128  # rows sampled at once, as each needs several tensors of vocabulary size
GROUP = 1024  # tokens sorted together: as many as a GPU sorts in one block
PROBABILITY_BITS, DIGIT_BITS = 30, 5  # of a float32 up to 1; found per round of the search


class Cut(IntEnum):
    """How to find the smallest probability that a row keeps; min-p applies in addition."""

    NONE = 0
    SEARCHED = 1  # for top-p without top-k
    RANKED = 2  # by sorting the best tokens

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: int) -> "Cut":
        if 0 < params.top_k < vocabulary:
            return cls.RANKED
        if params.top_p >= 1:
            return cls.NONE
        return cls.RANKED if vocabulary <= GROUP else cls.SEARCHED


def sample_rows(logits: Tensor, sampled: dict[int, Sequence]) -> tuple[Tensor, Tensor]:
    """Samples the rows with a temperature; returns the rows and the token of each."""
    vocabulary = logits.shape[1]
    held = [(Cut.of(one.request.sampling, vocabulary), row, one) for row, one in sampled.items()]
    held.sort(key=lambda entry: entry[0])  # so that rows of one cut are adjacent
    params = [(row, one.request.sampling, one.rng.random()) for _, row, one in held]
    columns = columns_on_device(
        [
            (row, one.temperature, one.top_k or vocabulary, one.top_p, one.min_p, uniform)
            for row, one, uniform in params
        ],
        logits.device,
    )
    cuts = [cut for cut, _, _ in held]
    tokens = []
    for rows in _slices(cuts):
        settings = [one for _, one, _ in params[rows]]
        mine = [column[rows] for column in columns]
        tokens.append(_sample_slice(logits, cuts[rows.start], settings, *mine))
    return to_index(columns[0]), torch.cat(tokens)


def _slices(cuts: list[Cut]) -> Iterator[slice]:
    """Yields slices of adjacent rows of one cut, of at most `SLICE` rows."""
    end = 0
    for _, run in groupby(cuts):
        first, end = end, end + len([*run])
        yield from (slice(at, min(at + SLICE, end)) for at in range(first, end, SLICE))


def _sample_slice(
    logits: Tensor,
    cut: Cut,
    params: list[SamplingParams],
    rows: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Samples rows of one cut; returns `[rows]` tokens. Tensor settings are `[rows, 1]`."""
    probabilities = _probabilities(logits.index_select(0, to_index(rows)), temperatures)
    if cut is Cut.NONE and not any(one.min_p for one in params):
        return _invert(probabilities, uniform)
    best = probabilities.amax(1, keepdim=True)
    least = min_p * best
    if cut is Cut.RANKED:
        most = min(logits.shape[1], max(one.top_k or logits.shape[1] for one in params))
        least = least.maximum(_least_of_ranked(probabilities, top_k, top_p, most))
    elif cut is Cut.SEARCHED:
        least = least.maximum(_least_by_search(probabilities, top_p))
    cut_off = probabilities < least.minimum(best)
    return _invert(probabilities.masked_fill_(cut_off, 0), uniform)


def _probabilities(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Returns the probabilities at `temperatures` `[rows, 1]`; overwrites `logits`."""
    logits -= logits.amax(1, keepdim=True)  # so that a small temperature cannot overflow
    logits /= temperatures.clamp(min=SMALLEST)
    return logits.softmax(1)


def _mass(probabilities: Tensor) -> Tensor:
    """Converts probabilities to int64 in units of `UNIT`."""
    return (probabilities / UNIT).long()


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Returns the first column of each row whose cumulative mass passes `uniform` of the total.

    `uniform` is `[rows, 1]`; the result is `[rows]`.
    """
    cumulative = _mass(probabilities).cumsum_(1)
    total = cumulative[:, -1:]
    passed = (uniform * total.double()).long().minimum(total - 1)
    return torch.searchsorted(cumulative, passed, right=True).squeeze(1)


def _least_of_ranked(probabilities: Tensor, top_k: Tensor, top_p: Tensor, most: int) -> Tensor:
    """Returns the least probability that top-k and top-p keep, `[rows, 1]`, by sorting.

    These are the best `top_k` tokens, and of those the best that hold `top_p` of their mass.
    `most` is the largest of `top_k`.
    """
    best = probabilities.topk(most, dim=1).values  # sorted, best first
    in_top_k = torch.arange(most, device=best.device) < top_k
    mass = _mass(best).masked_fill_(~in_top_k, 0)
    cumulative = mass.cumsum(1)
    in_top_p = cumulative - mass < top_p * cumulative[:, -1:].double()
    return best.masked_fill_(~(in_top_k & in_top_p), torch.inf).amin(1, keepdim=True)


def _least_by_search(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Returns the least probability that top-p keeps, `[rows, 1]`, without a full sort.

    It is the smallest float x for which the tokens more probable than x hold less than `top_p` of
    the mass. Floats are ordered as their bits, so the float before x is found digit by digit from
    the highest: the last digit for which the more probable tokens still hold enough.
    """
    groups = _sorted_groups(probabilities)  # [rows, groups, tokens], ascending
    up_to = F.pad(_mass(groups).cumsum_(2), (1, 0))  # mass of the first n tokens of a group
    total = up_to[:, :, -1].sum(1, keepdim=True)
    enough = top_p * total.double()
    digits = torch.arange(1 << DIGIT_BITS, dtype=torch.int32, device=groups.device)
    found = torch.zeros_like(top_p, dtype=torch.int32)
    for shift in reversed(range(0, PROBABILITY_BITS, DIGIT_BITS)):
        tried = (found + (digits << shift)).view(torch.float32)  # [rows, digits]
        each = tried.unsqueeze(1).repeat(1, groups.shape[1], 1)
        count = torch.searchsorted(groups, each, right=True)  # tokens at most this probable
        above = total - up_to.gather(2, count).sum(1)
        last = (above >= enough).sum(1, keepdim=True, dtype=torch.int32) - 1
        found += last.clamp_(min=0) << shift
    return (found + 1).view(torch.float32)


def _sorted_groups(probabilities: Tensor) -> Tensor:
    """Returns `[rows, groups, tokens]`, each group ascending, the last one padded with zeros."""
    rows, vocabulary = probabilities.shape
    groups = -(-vocabulary // GROUP)
    width = -(-vocabulary // groups)
    filled = F.pad(probabilities, (0, groups * width - vocabulary))
    return filled.view(rows, groups, width).sort(2).values
