"""Draws the next token of every row of logits at once.

Order: the model's log-probabilities are read first; then penalties, bias and forbidden ends change
the logits, and what a row's grammar does not allow is masked; then greedy rows take their maximum,
and the others are divided by their temperature, cut by top-k, top-p (of what top-k left) and min-p
(of the best token's probability), and drawn by inverting the cumulative distribution at one uniform
number of the sequence's own generator. So a row's token depends on its own logits and its own
generator, never on the batch it came in.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mi_runtime.logprobs import token_logprobs
from mi_runtime.request import TokenLogprobs
from mi_runtime.scheduler import Sampled
from mi_runtime.sequence import Sequence

SMALLEST = 2**-126  # the smallest normal float32
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
EIGHT_TIMES = 0x0101_0101_0101_0101  # times a byte: that byte in each of eight
ONE_BIT_EACH = 0x8040_2010_0804_0201 - 2**64  # bit n of byte n, as a signed word


class TokenCounts:
    """How often a sequence holds each token: what penalties are taken on. Grows with it."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        prompt = torch.tensor(sequence.tokens[: sequence.prompt_length], device=device)
        self.in_prompt = torch.bincount(prompt, minlength=vocab_size) > 0
        self.in_output = torch.zeros(vocab_size, device=device)  # fp32 counts
        self._counted = sequence.prompt_length

    def update(self, sequence: Sequence) -> None:
        new = torch.tensor(sequence.tokens[self._counted :], device=self.in_output.device)
        self.in_output += torch.bincount(new.long(), minlength=len(self.in_output))
        self._counted = len(sequence.tokens)


class Sampler:
    """Keeps token counts of the sequences that have penalties; otherwise stateless."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def sample(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> list[Sampled | None]:
        """One token a row of `logits` `[rows, vocabulary]`.

        None for a row that is not finite, or where penalties, bias, forbidden ends and grammar
        leave nothing to draw from.
        """
        drawable = logits.isfinite().all(1)
        if not drawable.all():
            logits = logits.nan_to_num(0.0, 0.0, 0.0)
        changed = logits.float()
        if any(map(_changes_logits, sequences)):
            if changed is logits:  # the model's own are read again for log-probabilities
                changed = logits.clone()
            self._change(changed, sequences)
            left = changed.amax(1).isfinite()
            _note_exhausted(sequences, (drawable & ~left).tolist())
            drawable &= left
            changed[~drawable] = 0.0
        tokens = _choose(changed, sequences)
        logprobs = _logprobs(logits, tokens, sequences)
        return [
            (token, logprob) if is_drawable else None
            for token, logprob, is_drawable in zip(tokens, logprobs, drawable.tolist(), strict=True)
        ]

    def _change(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
        self._penalize(logits, sequences)
        _add_bias(logits, sequences)
        _forbid(logits, sequences)
        _constrain(logits, sequences)

    def _penalize(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
        rows = [row for row, sequence in enumerate(sequences) if _has_penalty(sequence)]
        if not rows:
            return
        counts = [self._counts_of(sequences[row], logits) for row in rows]
        in_output = torch.stack([count.in_output for count in counts])
        seen = torch.stack([count.in_prompt for count in counts]) | (in_output > 0)
        params = [sequences[row].request.sampling for row in rows]
        repetition = _column([one.repetition_penalty for one in params], logits)
        presence = _column([one.presence_penalty for one in params], logits)
        frequency = _column([one.frequency_penalty for one in params], logits)
        mine = logits[rows]
        repeated = torch.where(mine > 0, mine / repetition, mine * repetition)
        mine = torch.where(seen, repeated, mine)
        logits[rows] = mine - frequency * in_output - presence * (in_output > 0)

    def _counts_of(self, sequence: Sequence, logits: Tensor) -> TokenCounts:
        if sequence not in self._counts:
            self._counts[sequence] = TokenCounts(sequence, logits.shape[1], logits.device)
        self._counts[sequence].update(sequence)
        return self._counts[sequence]


def _has_penalty(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


def _changes_logits(sequence: Sequence) -> bool:
    return (
        _has_penalty(sequence)
        or bool(sequence.request.sampling.logit_bias)
        or bool(sequence.forbidden_token_ids)
        or sequence.constrained_by is not None
    )


def _columns(like: Tensor, rows: list[tuple[float, ...]]) -> tuple[Tensor, ...]:
    """One fp32 `[rows, 1]` of each place in the tuples, all moved at once."""
    table = torch.tensor(rows, dtype=torch.float32, device=like.device)
    return table.unsqueeze(-1).unbind(1)


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    return torch.tensor([*values], dtype=torch.float32, device=like.device).unsqueeze(1)


def _add_bias(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    entries = [
        (row, token, bias)
        for row, sequence in enumerate(sequences)
        for token, bias in sequence.request.sampling.logit_bias
    ]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        index = tuple(torch.tensor(part, device=logits.device) for part in (rows, tokens))
        logits.index_put_(index, _column(biases, logits).squeeze(1), accumulate=True)


def _forbid(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    entries = [
        (row, token)
        for row, sequence in enumerate(sequences)
        for token in sequence.forbidden_token_ids
        if 0 <= token < logits.shape[1]  # a config may name an end that the vocabulary lacks
    ]
    if entries:
        rows, tokens = zip(*entries, strict=True)
        logits[list(rows), list(tokens)] = -torch.inf


def _constrain(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    """Leaves the rows under a grammar what it allows.

    A think block may be opened where the model likes that best of all tokens: beside the few that
    a grammar allows, an unlikely block would win.
    """
    held = [(row, one.constrained_by) for row, one in enumerate(sequences)]
    states = {row: state for row, state in held if state is not None}
    if not states:
        return
    forbidden = _forbidden([state.mask() for state in states.values()], logits)
    for at, (row, state) in enumerate(states.items()):
        beside = state.beside
        if beside is not None and (not state.may_open or int(logits[row].argmax()) == beside):
            forbidden[at, beside] = False
    if len(states) == len(sequences):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        rows = list(states)
        logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


def _note_exhausted(sequences: tuple[Sequence, ...], nothing_left: list[bool]) -> None:
    for sequence, nothing in zip(sequences, nothing_left, strict=True):
        if nothing and sequence.constrained_by is not None:
            sequence.constrained_by.exhausted = True


def _forbidden(masks: list[bytes], like: Tensor) -> Tensor:
    """Bool `[rows, vocabulary]` of bit masks; what a mask is too short for is forbidden.

    A byte of a mask is repeated to the eight bytes of a word, and of each of them one bit is kept.
    """
    width = -(-like.shape[1] // 8)  # bytes of a row
    packed = b"".join(mask[:width].ljust(width, b"\0") for mask in masks)
    octets = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(like.device).long()
    bits = (octets * EIGHT_TIMES) & ONE_BIT_EACH
    return bits.view(torch.uint8).view(len(masks), -1)[:, : like.shape[1]].eq(0)


def _choose(logits: Tensor, sequences: tuple[Sequence, ...]) -> list[int]:
    forced = {row: one.forced_token for row, one in enumerate(sequences)}
    drawn = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.request.sampling.temperature > 0 and forced[row] is None
    ]
    greedy = len(drawn) < len(sequences)
    tokens: list[int] = logits.argmax(1).tolist() if greedy else [0] * len(sequences)
    cut = [row for row in drawn if _is_cut(sequences[row])]
    free = [row for row in drawn if not _is_cut(sequences[row])] if cut else drawn
    for rows, draw in ((free, _draw), (cut, _draw_cut)):
        if rows:
            mine = [sequences[row] for row in rows]
            chosen = draw(logits[rows], mine).tolist()  # the index makes a copy
            for row, token in zip(rows, chosen, strict=True):
                tokens[row] = token
    return [
        chosen if must is None else must
        for chosen, must in zip(tokens, forced.values(), strict=True)
    ]


def _is_cut(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _probabilities(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Of rows at their temperatures `[rows, 1]`; `logits` is overwritten."""
    logits -= logits.amax(1, keepdim=True)  # so that a small temperature cannot overflow
    logits /= temperatures.clamp_(min=SMALLEST)
    return logits.softmax(1)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """`[rows]` columns: the first whose cumulative weight passes `uniform` `[rows, 1]` of all."""
    cumulative = weights.cumsum(1)
    least = (uniform * BELOW_ONE).mul_(cumulative[:, -1:])
    return torch.searchsorted(cumulative, least, right=True).squeeze(1)


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    temperatures, uniform = _columns(
        logits, [(one.request.sampling.temperature, one.rng.random()) for one in sequences]
    )
    return _invert(_probabilities(logits, temperatures), uniform)


def _draw_cut(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draws from what top-k, top-p and min-p leave.

    The cut is a least probability: tokens as probable as the last one kept are kept as well, since
    the order of equals depends on the batch.
    """
    vocabulary = logits.shape[1]
    top_ks = [min(one.request.sampling.top_k or vocabulary, vocabulary) for one in sequences]
    params = [one.request.sampling for one in sequences]
    temperatures, top_k, top_p, min_p, uniform = _columns(
        logits,
        [
            (one.temperature, k, one.top_p, one.min_p, sequence.rng.random())
            for one, k, sequence in zip(params, top_ks, sequences, strict=True)
        ],
    )
    probabilities = _probabilities(logits, temperatures)
    best = probabilities.topk(max(top_ks), dim=1).values  # sorted, best first
    in_top_k = torch.arange(best.shape[1], device=best.device) < top_k
    cumulative = (best * in_top_k).cumsum(1)
    in_top_p = (cumulative - best < top_p * cumulative[:, -1:]) | (top_p >= 1)
    kept = in_top_k & in_top_p & (best >= min_p * best[:, :1])
    kept[:, 0] = True
    least = best.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    return _invert(probabilities * (probabilities >= least), uniform)


def _logprobs(
    logits: Tensor, tokens: list[int], sequences: tuple[Sequence, ...]
) -> list[TokenLogprobs | None]:
    out: list[TokenLogprobs | None] = [None] * len(sequences)
    wanted = [sequence.request.sampling.logprobs for sequence in sequences]
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return out
    found = token_logprobs(
        logits[rows], [tokens[row] for row in rows], [wanted[row] or 0 for row in rows]
    )
    for row, logprobs in zip(rows, found, strict=True):
        out[row] = logprobs
    return out
