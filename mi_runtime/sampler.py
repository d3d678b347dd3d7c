"""Draws the next token of every row of logits at once.

Order: the model's log-probabilities are read first; then penalties, bias and forbidden ends change
the logits; then greedy rows take their maximum, and the others are divided by their temperature,
cut by top-k, top-p (of what top-k left) and min-p (of the best token's probability), and drawn by
inverting the cumulative distribution at one uniform number of the sequence's own generator. So a
row's token depends on its own logits and its own generator, never on the batch it came in.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mi_runtime.request import TokenLogprobs
from mi_runtime.scheduler import Sampled
from mi_runtime.sequence import Sequence

BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


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
        """One token a row of `logits` `[rows, vocabulary]`; None for a row that is not finite."""
        finite = logits.isfinite().all(1).tolist()
        if not all(finite):
            logits = logits.nan_to_num(0.0, 0.0, 0.0)
        changed = self._change_logits(logits, sequences)
        tokens = _choose(changed, sequences)
        logprobs = _logprobs(logits, tokens, sequences)
        return [
            (token, logprob) if is_finite else None
            for token, logprob, is_finite in zip(tokens, logprobs, finite, strict=True)
        ]

    def _change_logits(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> Tensor:
        changed = logits.float()
        if changed is logits:  # the model's own are read again for log-probabilities
            changed = logits.clone() if any(map(_changes_logits, sequences)) else logits
        self._penalize(changed, sequences)
        _add_bias(changed, sequences)
        _forbid_ends(changed, sequences)
        return changed

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
        or sequence.forbids_ending
    )


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _add_bias(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    entries = [
        (row, token, bias)
        for row, sequence in enumerate(sequences)
        for token, bias in sequence.request.sampling.logit_bias
    ]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        logits[list(rows), list(tokens)] += _column(list(biases), logits).squeeze(1)


def _forbid_ends(logits: Tensor, sequences: tuple[Sequence, ...]) -> None:
    entries = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.forbids_ending
        for token in sequence.ending_token_ids
    ]
    if entries:
        rows, tokens = zip(*entries, strict=True)
        logits[list(rows), list(tokens)] = -torch.inf


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
            for row, token in zip(rows, draw(logits[rows], mine).tolist(), strict=True):
                tokens[row] = token
    return [
        chosen if must is None else must
        for chosen, must in zip(tokens, forced.values(), strict=True)
    ]


def _is_cut(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _probabilities(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    temperatures = [sequence.request.sampling.temperature for sequence in sequences]
    return (logits / _column(temperatures, logits)).softmax(1)


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    return _invert(_probabilities(logits, sequences), sequences)


def _invert(weights: Tensor, sequences: list[Sequence]) -> Tensor:
    """`[rows]` columns: the first whose cumulative weight passes the sequence's next number."""
    uniform = _column([sequence.rng.random() for sequence in sequences], weights) * BELOW_ONE
    cumulative = weights.cumsum(1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


def _draw_cut(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draws from what top-k, top-p and min-p leave."""
    params = [sequence.request.sampling for sequence in sequences]
    vocabulary = logits.shape[1]
    top_k = [min(one.top_k or vocabulary, vocabulary) for one in params]
    best, ids = _probabilities(logits, sequences).topk(max(top_k), dim=1)  # best first
    rank = torch.arange(best.shape[1], device=best.device)
    best = best * (rank < _column([float(k) for k in top_k], best))
    before = best.cumsum(1) - best
    top_p = _column([one.top_p for one in params], best)
    min_p = _column([one.min_p for one in params], best)
    kept = (before < top_p * best.sum(1, keepdim=True)) & (best >= min_p * best[:, :1])
    kept[:, 0] = True
    return ids.gather(1, _invert(best * kept, sequences).unsqueeze(1)).squeeze(1)


def _logprobs(
    logits: Tensor, tokens: list[int], sequences: tuple[Sequence, ...]
) -> list[TokenLogprobs | None]:
    out: list[TokenLogprobs | None] = [None] * len(sequences)
    wanted = [sequence.request.sampling.logprobs for sequence in sequences]
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return out
    table = logits[rows].float().log_softmax(1)
    own = table.gather(1, torch.tensor([[tokens[row]] for row in rows], device=table.device))
    width = min(max(wanted[row] or 0 for row in rows), table.shape[1])
    values, ids = (part.tolist() for part in table.topk(width, dim=1))
    for index, row in enumerate(rows):
        top = zip(ids[index], values[index], strict=True)
        out[row] = TokenLogprobs(own[index].item(), tuple(top)[: wanted[row]])
    return out
