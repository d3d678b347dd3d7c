"""Draws the next token of every row of logits at once.

Order: the model's log-probabilities are read first; then penalties, bias and forbidden ends change
the logits, and what a row's grammar does not allow is masked; then greedy rows take their maximum,
and the others are divided by their temperature, cut by top-k, top-p (of what top-k left) and min-p
(of the best token's probability), and drawn by inverting the cumulative distribution at one uniform
number of the sequence's own generator. So a row's token depends on its own logits and its own
generator, never on the batch it came in: probabilities are added up as whole numbers of `UNIT`, for
the order in which a GPU adds up fractions, and so their sum, depends on the number of rows.

A cut is a least probability: tokens as probable as the last one kept are kept as well, since the
order of equals depends on the batch. Top-p without top-k does not sort a large vocabulary: it sorts
groups of tokens, and searches them all for that probability, five bits at a time.

Everything stays on the logits' device and the host waits for nothing: what it knows goes there as
tables with one row a sequence, and a `SamplerOutput` is read when its copy has arrived.
Tensors are indexed by methods that take an index from the device; a list in brackets would be
copied there by a copy that is waited for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_runtime.device.transfer import on_device, send
from mi_runtime.execution.logprobs import RowLogprobs, read_logprobs, token_logprobs
from mi_runtime.request import SamplingParams
from mi_runtime.scheduling.chunk import Sampled
from mi_runtime.scheduling.grammar import GrammarState
from mi_runtime.scheduling.sequence import Sequence

SMALLEST = 2**-126  # the smallest normal float32
UNIT = 2.0**-50  # of probability
SLICE = 128  # rows that are penalized or drawn at once: each takes several copies of a vocabulary
GROUP = 1024  # tokens that are sorted together: what a GPU sorts in one block
PROBABILITY_BITS, DIGIT_BITS = 30, 5  # of a float32 up to 1; of them, those that one round finds
EIGHT_TIMES = 0x0101_0101_0101_0101  # times a byte: that byte in each of eight
ONE_BIT_EACH = 0x8040_2010_0804_0201 - 2**64  # bit n of byte n, as a signed word
NOT_FINITE: Final = -1  # in the place of a token: the model's logits are not finite
NOTHING_LEFT: Final = -2  # likewise: what changes them leaves nothing to draw from


class TokenCounts:
    """How often a sequence holds each token: what penalties are taken on. Grows with it."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        prompt = on_device(sequence.tokens[: sequence.prompt_length], torch.int64, device)
        in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt = in_prompt.index_fill_(0, prompt, True)
        self.in_output = torch.zeros(vocab_size, device=device)  # fp32 counts
        self.counted = sequence.prompt_length  # tokens of the sequence

    def add(self, tokens: Tensor) -> None:
        """Takes the next tokens of the answer, `[any]` int64."""
        self.in_output.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
        self.counted += len(tokens)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What was drawn for the rows of a step, on the device."""

    sequences: tuple[Sequence, ...]  # one a row
    tokens: Tensor  # [rows] int64; 0 where nothing can be drawn
    outcomes: Tensor  # [rows] int32: the token, or why there is none
    logprobs: tuple[tuple[list[int], RowLogprobs], ...]  # rows, and what was read of them

    @property
    def tensors(self) -> list[Tensor]:
        """What is to be copied to the host for `read`."""
        return [self.outcomes, *(one for _, found in self.logprobs for one in found.tensors)]

    def read(self, host: Iterator[Tensor]) -> list[Sampled | None]:
        """One a row, of the `tensors` that come next on the host.

        None for a row that is not finite, or where penalties, bias, forbidden ends and grammar
        leave nothing to draw from; a grammar that left nothing is told.
        """
        outcomes = next(host).tolist()
        read = [(rows, read_logprobs(host)) for rows, _ in self.logprobs]
        logprobs = {row: one for rows, own in read for row, one in zip(rows, own, strict=True)}
        for sequence, outcome in zip(self.sequences, outcomes, strict=True):
            if outcome == NOTHING_LEFT and sequence.constrained_by is not None:
                sequence.constrained_by.exhausted = True
        return [
            None if outcome < 0 else (outcome, logprobs.get(row))
            for row, outcome in enumerate(outcomes)
        ]


class Sampler:
    """Keeps token counts of the sequences that have penalties; otherwise stateless."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def sample(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> SamplerOutput:
        """One token a row of `logits` `[rows, vocabulary]`.

        A row that nothing can be drawn from harms no other: nothing is computed across rows.
        """
        finite = logits.amax(1).isfinite() & logits.amin(1).isfinite()
        changed = logits.float()
        if any(map(_changes_logits, sequences)):
            if changed is logits:  # the model's own are read again for log-probabilities
                changed = logits.clone()
            self._change(changed, sequences)
            outcomes = _choose(changed, sequences)
            outcomes = torch.where(changed.amax(1).isfinite(), outcomes, NOTHING_LEFT)
        else:
            outcomes = _choose(changed, sequences)
        outcomes = torch.where(finite, outcomes, NOT_FINITE)
        tokens = outcomes.clamp(min=0)
        return SamplerOutput(
            sequences, tokens, outcomes.int(), _logprobs(logits, tokens, sequences)
        )

    def _change(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
        self._penalize(logits, sequences)
        _add_bias(logits, sequences)
        _forbid(logits, sequences)
        _constrain(logits, sequences)

    def _penalize(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
        penalized = [
            (row, one) for row, one in enumerate(sequences) if one.request.sampling.has_penalty
        ]
        for first in range(0, len(penalized), SLICE):
            self._penalize_some(logits, dict(penalized[first : first + SLICE]))

    def _penalize_some(self, logits: Tensor, penalized: dict[int, Sequence]) -> None:
        counts = self._counts_of(list(penalized.values()), logits)
        in_output = torch.stack([count.in_output for count in counts])
        seen = torch.stack([count.in_prompt for count in counts]) | (in_output > 0)
        params = {row: one.request.sampling for row, one in penalized.items()}
        rows, repetition, presence, frequency = _columns(
            logits,
            [
                (row, one.repetition_penalty, one.presence_penalty, one.frequency_penalty)
                for row, one in params.items()
            ],
        )
        index = _index(rows)
        mine = logits.index_select(0, index)
        repeated = torch.where(mine > 0, mine / repetition, mine * repetition)
        mine = torch.where(seen, repeated, mine)
        mine = mine - frequency * in_output - presence * (in_output > 0)
        logits.index_copy_(0, index, mine)

    def _counts_of(self, sequences: list[Sequence], logits: Tensor) -> list[TokenCounts]:
        for one in sequences:
            if one not in self._counts:
                self._counts[one] = TokenCounts(one, logits.shape[1], logits.device)
        counts = [self._counts[one] for one in sequences]
        new = [one.tokens[count.counted :] for one, count in zip(sequences, counts, strict=True)]
        together = [token for tokens in new for token in tokens]
        sent = on_device(together, torch.int64, logits.device)
        for count, tokens in zip(counts, torch.split(sent, [*map(len, new)]), strict=True):
            count.add(tokens)
        return counts


def _changes_logits(sequence: Sequence) -> bool:
    if not sequence.has_logits_processors and sequence.grammar is None:
        return False
    return (
        sequence.request.sampling.has_penalty
        or bool(sequence.request.sampling.logit_bias)
        or bool(sequence.forbidden_token_ids)
        or sequence.constrained_by is not None
    )


def _columns(like: Tensor, rows: Iterable[tuple[float, ...]]) -> tuple[Tensor, ...]:
    """One fp32 `[rows, 1]` of each place in the tuples, all moved at once."""
    return on_device([*rows], torch.float32, like.device).unsqueeze(-1).unbind(1)


def _index(column: Tensor) -> Tensor:
    """Whole numbers of a column as an index; below 2^24 they are exact."""
    return column.squeeze(1).long()


def _add_bias(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    entries = [
        (row, token, bias)
        for row, sequence in enumerate(sequences)
        for token, bias in sequence.request.sampling.logit_bias
    ]
    if entries:
        rows, tokens, biases = _columns(logits, entries)
        logits.index_put_((_index(rows), _index(tokens)), biases.squeeze(1), accumulate=True)


def _forbid(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    entries = [
        (row, token)
        for row, sequence in enumerate(sequences)
        for token in sequence.forbidden_token_ids
        if 0 <= token < logits.shape[1]  # a config may name an end that the vocabulary lacks
    ]
    if entries:
        rows, tokens = on_device(entries, torch.int64, logits.device).unbind(1)
        logits.index_put_((rows, tokens), logits.new_full((), -torch.inf))


def _constrain(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    """Leaves the rows under a grammar what it allows.

    A think block may be opened where the model likes that best of all tokens: beside the few that
    a grammar allows, an unlikely block would win.
    """
    held = [(row, one.constrained_by) for row, one in enumerate(sequences)]
    states = {row: state for row, state in held if state is not None}
    if not states:
        return
    masks = [_mask(state) for state in states.values()]
    forbidden = _forbidden(masks, logits)
    opens = [
        (at, row, state.extra_token)
        for at, (row, state) in enumerate(states.items())
        if state.may_open_block
        and state.extra_token is not None
        and not _allows(masks[at], state.extra_token)
    ]
    if opens:
        at, rows, tags = on_device(opens, torch.int64, logits.device).unbind(1)
        best = logits.index_select(0, rows).argmax(1)
        forbidden.index_put_((at, tags), best != tags)
    if len(states) == len(sequences):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = on_device([*states], torch.int64, logits.device)
        left = logits.index_select(0, index).masked_fill_(forbidden, -torch.inf)
        logits.index_copy_(0, index, left)


def _mask(state: GrammarState) -> bytes:
    """What may come next: a grammar's mask, and a token beside it that opens no block."""
    mask, extra_token = state.mask(), state.extra_token
    if extra_token is None or state.may_open_block:
        return mask
    longer = bytearray(mask.ljust(extra_token // 8 + 1, b"\0"))
    longer[extra_token // 8] |= 1 << extra_token % 8
    return bytes(longer)


def _allows(mask: bytes, token: int) -> bool:
    return len(mask) > token // 8 and bool(mask[token // 8] >> token % 8 & 1)


def _forbidden(masks: list[bytes], like: Tensor) -> Tensor:
    """Bool `[rows, vocabulary]` of bit masks; what a mask is too short for is forbidden.

    A byte of a mask is repeated to the eight bytes of a word, and of each of them one bit is kept.
    """
    width = -(-like.shape[1] // 8)  # bytes of a row
    packed = b"".join(mask[:width].ljust(width, b"\0") for mask in masks)
    octets = send(torch.frombuffer(bytearray(packed), dtype=torch.uint8), like.device).long()
    bits = (octets * EIGHT_TIMES) & ONE_BIT_EACH
    return bits.view(torch.uint8).view(len(masks), -1)[:, : like.shape[1]].eq(0)


def _choose(logits: Tensor, sequences: tuple[Sequence, ...]) -> Tensor:
    """`[rows]` int64."""
    forced: dict[int, int] = {}
    drawn: dict[int, Sequence] = {}
    for row, one in enumerate(sequences):
        token = one.forced_token
        if token is not None:
            forced[row] = token
        elif one.request.sampling.temperature > 0:
            drawn[row] = one
    greedy = len(drawn) < len(sequences)
    tokens = logits.argmax(1) if greedy else logits.new_zeros(len(logits), dtype=torch.int64)
    if drawn:
        tokens.index_copy_(0, *_draw(logits, drawn))
    if forced:
        index, must = on_device([*forced.items()], torch.int64, logits.device).unbind(1)
        tokens.index_copy_(0, index, must)
    return tokens


# --- Drawing --------------------------------------------------------------------------------------


class Cut(IntEnum):
    """How the least probability of a row is found; min-p comes on top."""

    NONE = 0
    SEARCHED = 1  # for top-p alone
    RANKED = 2  # the best tokens are sorted, as many as top-k says

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: int) -> "Cut":
        if 0 < params.top_k < vocabulary:
            return cls.RANKED
        if params.top_p >= 1:
            return cls.NONE
        return cls.RANKED if vocabulary <= GROUP else cls.SEARCHED


def _draw(logits: Tensor, drawn: dict[int, Sequence]) -> tuple[Tensor, Tensor]:
    """Rows, and the token of each."""
    vocabulary = logits.shape[1]
    held = [(Cut.of(one.request.sampling, vocabulary), row, one) for row, one in drawn.items()]
    held.sort(key=lambda entry: entry[0])  # rows of one cut together
    params = [(row, one.request.sampling, one.rng.random()) for _, row, one in held]
    columns = _columns(
        logits,
        [
            (row, one.temperature, one.top_k or vocabulary, one.top_p, one.min_p, uniform)
            for row, one, uniform in params
        ],
    )
    cuts = [cut for cut, _, _ in held]
    tokens = []
    for part in _slices(cuts):
        settings = [one for _, one, _ in params[part]]
        mine = [column[part] for column in columns]
        tokens.append(_draw_some(logits, cuts[part.start], settings, *mine))
    return _index(columns[0]), torch.cat(tokens)


def _slices(cuts: list[Cut]) -> Iterator[slice]:
    """Runs of one cut, of at most `SLICE` rows."""
    end = 0
    for _, run in groupby(cuts):
        first, end = end, end + len([*run])
        yield from (slice(at, min(at + SLICE, end)) for at in range(first, end, SLICE))


def _draw_some(
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
    """`[rows]` tokens; what is a tensor is `[rows, 1]`."""
    probabilities = _probabilities(logits.index_select(0, _index(rows)), temperatures)
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
    """Of rows at their temperatures `[rows, 1]`; `logits` is overwritten."""
    logits -= logits.amax(1, keepdim=True)  # so that a small temperature cannot overflow
    logits /= temperatures.clamp(min=SMALLEST)
    return logits.softmax(1)


def _mass(probabilities: Tensor) -> Tensor:
    """int64, in units."""
    return (probabilities / UNIT).long()


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """`[rows]` columns: the first whose cumulative mass passes `uniform` `[rows, 1]` of all."""
    cumulative = _mass(probabilities).cumsum_(1)
    total = cumulative[:, -1:]
    passed = (uniform * total.double()).long().minimum(total - 1)
    return torch.searchsorted(cumulative, passed, right=True).squeeze(1)


def _least_of_ranked(probabilities: Tensor, top_k: Tensor, top_p: Tensor, most: int) -> Tensor:
    """`[rows, 1]`: the least probability among the best `top_k`, and of them among the best that
    hold `top_p` of their mass. `most` is the largest of `top_k`."""
    best = probabilities.topk(most, dim=1).values  # sorted, best first
    in_top_k = torch.arange(most, device=best.device) < top_k
    mass = _mass(best).masked_fill_(~in_top_k, 0)
    cumulative = mass.cumsum(1)
    in_top_p = cumulative - mass < top_p * cumulative[:, -1:].double()
    return best.masked_fill_(~(in_top_k & in_top_p), torch.inf).amin(1, keepdim=True)


def _least_by_search(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """`[rows, 1]`: the least probability among the best that hold `top_p` of the mass.

    It is the first float x, as its bits are counted, for which what is more probable than x has
    less than that. Its predecessor is found digit by digit, the highest first: the last digit at
    which what is more probable still has enough.
    """
    groups = _sorted_groups(probabilities)  # [rows, groups, tokens], ascending
    up_to = F.pad(_mass(groups).cumsum_(2), (1, 0))  # mass of the first n of a group
    total = up_to[:, :, -1].sum(1, keepdim=True)
    enough = top_p * total.double()
    digits = torch.arange(1 << DIGIT_BITS, dtype=torch.int32, device=groups.device)
    found = torch.zeros_like(top_p, dtype=torch.int32)
    for shift in reversed(range(0, PROBABILITY_BITS, DIGIT_BITS)):
        tried = (found + (digits << shift)).view(torch.float32)  # [rows, digits]
        each = tried.unsqueeze(1).repeat(1, groups.shape[1], 1)
        count = torch.searchsorted(groups, each, right=True)  # no more probable than that
        above = total - up_to.gather(2, count).sum(1)
        last = (above >= enough).sum(1, keepdim=True, dtype=torch.int32) - 1
        found += last.clamp_(min=0) << shift
    return (found + 1).view(torch.float32)


def _sorted_groups(probabilities: Tensor) -> Tensor:
    """`[rows, groups, tokens]`: each group ascending, the last one filled up with zeros."""
    rows, vocabulary = probabilities.shape
    groups = -(-vocabulary // GROUP)
    width = -(-vocabulary // groups)
    filled = F.pad(probabilities, (0, groups * width - vocabulary))
    return filled.view(rows, groups, width).sort(2).values


def _logprobs(
    logits: Tensor, tokens: Tensor, sequences: tuple[Sequence, ...]
) -> tuple[tuple[list[int], RowLogprobs], ...]:
    """Of the rows that want them, those of one count together."""
    wanted: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        count = sequence.request.sampling.logprobs
        if count is not None:
            wanted.setdefault(count, []).append(row)
    found = []
    for count, rows in wanted.items():
        index = on_device(rows, torch.int64, logits.device)
        own = token_logprobs(logits.index_select(0, index), tokens.index_select(0, index), count)
        found.append((rows, own))
    return tuple(found)
