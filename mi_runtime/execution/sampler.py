"""Samples the next token of every row of logits at once.

Logits processors change the logits first. Then rows without temperature take the most probable
token, rows with one are sampled (see `random_sampling`), and tokens that the engine forces replace
both. The reported log-probabilities are those of the unchanged logits.

Everything stays on the device of the logits, and the host never waits. Per-row settings are sent as
tables, and a `SamplerOutput` is read when its copy has arrived. Tensors are indexed by methods that
take a device tensor, since indexing with a list would copy it and wait.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mi_runtime.device.transfer import on_device
from mi_runtime.execution.logits_processors import LogitsProcessors
from mi_runtime.execution.logprobs import RowLogprobs, read_logprobs, token_logprobs
from mi_runtime.execution.random_sampling import sample_rows
from mi_runtime.scheduling.chunk import Sampled
from mi_runtime.scheduling.sequence import Sequence

NOT_FINITE: Final = -1  # instead of a token: the model's logits are not finite
NOTHING_LEFT: Final = -2  # instead of a token: every token is forbidden


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
        self._processors = LogitsProcessors()

    def sample(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> SamplerOutput:
        """Samples one token per row of `logits` `[rows, vocabulary]`.

        A row without any possible token does not affect others: nothing is computed across rows.
        """
        finite = logits.amax(1).isfinite() & logits.amin(1).isfinite()
        changed = logits.float()
        due = self._processors.due(sequences)
        if due:
            if changed is logits:  # log-probabilities need the unchanged logits
                changed = logits.clone()
            for processor, rows in due:
                processor.apply(changed, rows)
            outcomes = _choose(changed, sequences)
            outcomes = torch.where(changed.amax(1).isfinite(), outcomes, NOTHING_LEFT)
        else:
            outcomes = _choose(changed, sequences)
        outcomes = torch.where(finite, outcomes, NOT_FINITE)
        tokens = outcomes.clamp(min=0)
        return SamplerOutput(
            sequences, tokens, outcomes.int(), _logprobs(logits, tokens, sequences)
        )


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
        tokens.index_copy_(0, *sample_rows(logits, sampled))
    if forced:
        index, must = on_device([*forced.items()], torch.int64, logits.device).unbind(1)
        tokens.index_copy_(0, index, must)
    return tokens


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
