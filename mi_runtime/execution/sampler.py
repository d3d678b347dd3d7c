"""Samples the next token of every row of logits at once.

Penalties, bias and forbidden ends change the logits, and tokens that a row's grammar does not allow
are masked. Then greedy rows take the maximum. The other rows are divided by their temperature, cut
by top-k, top-p (of the probability that top-k left) and min-p (relative to the best token), and
sampled by inverting the cumulative distribution at one uniform number from the sequence's own
generator. The reported log-probabilities are those of the unchanged logits.

A row's token depends on its own logits and its own generator, never on the batch. Probabilities are
therefore summed as integers, in units of `UNIT`: the order in which a GPU sums floats, and so their
sum, depends on the number of rows.

A cut keeps every token of at least some probability. So tokens as probable as the last one kept are
kept as well, because the order of equal ones depends on the batch. Top-p without top-k does not
sort a large vocabulary: it sorts groups of tokens, and searches for that probability in all of them
five bits at a time.

Everything stays on the device of the logits, and the host never waits. Per-row settings are sent as
tables, and a `SamplerOutput` is read when its copy has arrived. Tensors are indexed by methods that
take a device tensor, since indexing with a list would copy it and wait.
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
UNIT = 2.0**-50  # of probability, for integer sums
SLICE = 128  # rows processed at once, as each needs several tensors of vocabulary size
GROUP = 1024  # tokens sorted together: as many as a GPU sorts in one block
PROBABILITY_BITS, DIGIT_BITS = 30, 5  # of a float32 up to 1; found per round of the search
EIGHT_TIMES = 0x0101_0101_0101_0101  # a byte times this is that byte in all eight bytes
ONE_BIT_EACH = 0x8040_2010_0804_0201 - 2**64  # bit n of byte n, as a signed word
NOT_FINITE: Final = -1  # instead of a token: the model's logits are not finite
NOTHING_LEFT: Final = -2  # instead of a token: every token is forbidden


class TokenCounts:
    """How often each token occurs in a sequence, which its penalties need."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        prompt = on_device(sequence.tokens[: sequence.prompt_length], torch.int64, device)
        in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt = in_prompt.index_fill_(0, prompt, True)
        self.in_output = torch.zeros(vocab_size, device=device)  # fp32 counts
        self.counted = sequence.prompt_length  # tokens of the sequence counted so far

    def add(self, tokens: Tensor) -> None:
        """Counts the next tokens of the answer, `[any]` int64."""
        self.in_output.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
        self.counted += len(tokens)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """The sampled tokens of a step, on the device."""

    sequences: tuple[Sequence, ...]  # one per row
    tokens: Tensor  # [rows] int64; 0 where no token can be sampled
    outcomes: Tensor  # [rows] int32: the token, or NOT_FINITE, or NOTHING_LEFT
    logprobs: tuple[tuple[list[int], RowLogprobs], ...]  # rows, and their log-probabilities

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that `read` needs on the host."""
        return [self.outcomes, *(one for _, found in self.logprobs for one in found.tensors)]

    def read(self, host: Iterator[Tensor]) -> list[Sampled | None]:
        """Reads the `tensors` from the host, and returns one result per row.

        The result is None if the logits are not finite, or if penalties, bias, forbidden ends and
        grammar leave no token; a grammar is then marked as exhausted.
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
    """Samples tokens. Its only state is the token counts of sequences with penalties."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def sample(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> SamplerOutput:
        """Samples one token per row of `logits` `[rows, vocabulary]`.

        A row without any possible token does not affect others: nothing is computed across rows.
        """
        finite = logits.amax(1).isfinite() & logits.amin(1).isfinite()
        changed = logits.float()
        if any(map(_changes_logits, sequences)):
            if changed is logits:  # log-probabilities need the unchanged logits
                changed = logits.clone()
            self._apply_rules(changed, sequences)
            outcomes = _choose(changed, sequences)
            outcomes = torch.where(changed.amax(1).isfinite(), outcomes, NOTHING_LEFT)
        else:
            outcomes = _choose(changed, sequences)
        outcomes = torch.where(finite, outcomes, NOT_FINITE)
        tokens = outcomes.clamp(min=0)
        return SamplerOutput(
            sequences, tokens, outcomes.int(), _logprobs(logits, tokens, sequences)
        )

    def _apply_rules(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
        """Applies penalties, bias, forbidden ends and grammars to the logits, in place."""
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
        """Returns the token counts of these sequences, brought up to date in one copy."""
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
    """Sends rows of numbers at once, and returns each column as fp32 `[rows, 1]`."""
    return on_device([*rows], torch.float32, like.device).unsqueeze(-1).unbind(1)


def _index(column: Tensor) -> Tensor:
    """Converts a column of integers, exact in fp32 below 2^24, to an int64 index."""
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
        if 0 <= token < logits.shape[1]  # a config may name an end token beyond the vocabulary
    ]
    if entries:
        rows, tokens = on_device(entries, torch.int64, logits.device).unbind(1)
        logits.index_put_((rows, tokens), logits.new_full((), -torch.inf))


def _constrain(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    """Masks the tokens that a row's grammar does not allow.

    The tag that opens a think block is allowed only if it is the most probable of all tokens:
    among the few that a grammar allows, even an unlikely tag would win.
    """
    grammars = [(row, one.constrained_by) for row, one in enumerate(sequences)]
    states = {row: state for row, state in grammars if state is not None}
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
    """Returns the grammar's mask, with the extra token unless that would open a block."""
    mask, extra_token = state.mask(), state.extra_token
    if extra_token is None or state.may_open_block:
        return mask
    longer = bytearray(mask.ljust(extra_token // 8 + 1, b"\0"))
    longer[extra_token // 8] |= 1 << extra_token % 8
    return bytes(longer)


def _allows(mask: bytes, token: int) -> bool:
    return len(mask) > token // 8 and bool(mask[token // 8] >> token % 8 & 1)


def _forbidden(masks: list[bytes], like: Tensor) -> Tensor:
    """Expands bit masks to bool `[rows, vocabulary]`, true for forbidden tokens.

    Tokens beyond the end of a mask are forbidden. Each byte of a mask is repeated to the eight
    bytes of a word, and one bit of each is kept.
    """
    width = -(-like.shape[1] // 8)  # bytes of a row
    packed = b"".join(mask[:width].ljust(width, b"\0") for mask in masks)
    octets = send(torch.frombuffer(bytearray(packed), dtype=torch.uint8), like.device).long()
    bits = (octets * EIGHT_TIMES) & ONE_BIT_EACH
    return bits.view(torch.uint8).view(len(masks), -1)[:, : like.shape[1]].eq(0)


def _choose(logits: Tensor, sequences: tuple[Sequence, ...]) -> Tensor:
    """Returns the token of every row, `[rows]` int64: forced, sampled or greedy."""
    forced: dict[int, int] = {}
    sampled: dict[int, Sequence] = {}
    for row, one in enumerate(sequences):
        token = one.forced_token
        if token is not None:
            forced[row] = token
        elif one.request.sampling.temperature > 0:
            sampled[row] = one
    greedy = len(sampled) < len(sequences)
    tokens = logits.argmax(1) if greedy else logits.new_zeros(len(logits), dtype=torch.int64)
    if sampled:
        tokens.index_copy_(0, *_sample_rows(logits, sampled))
    if forced:
        index, must = on_device([*forced.items()], torch.int64, logits.device).unbind(1)
        tokens.index_copy_(0, index, must)
    return tokens


# --- Sampling ------------------------------------------------------------------------------------


class Cut(IntEnum):
    """How the least probability that a row keeps is found; min-p applies in addition."""

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


def _sample_rows(logits: Tensor, sampled: dict[int, Sequence]) -> tuple[Tensor, Tensor]:
    """Samples the rows with a temperature; returns the rows and the token of each."""
    vocabulary = logits.shape[1]
    held = [(Cut.of(one.request.sampling, vocabulary), row, one) for row, one in sampled.items()]
    held.sort(key=lambda entry: entry[0])  # so that rows of one cut are adjacent
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
    for rows in _slices(cuts):
        settings = [one for _, one, _ in params[rows]]
        mine = [column[rows] for column in columns]
        tokens.append(_sample_slice(logits, cuts[rows.start], settings, *mine))
    return _index(columns[0]), torch.cat(tokens)


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


def _logprobs(
    logits: Tensor, tokens: Tensor, sequences: tuple[Sequence, ...]
) -> tuple[tuple[list[int], RowLogprobs], ...]:
    """Returns log-probabilities of the rows that want them, grouped by their count."""
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
