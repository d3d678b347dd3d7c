"""A step on its way through the device: launched, sampled, then read."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_runtime.device.transfer import Readback, on_device
from mi_runtime.execution.logprobs import RowLogprobs, read_logprobs, token_logprobs
from mi_runtime.execution.sampler import Sampler, SamplerOutput
from mi_runtime.request import TokenLogprobs
from mi_runtime.scheduling.chunk import Chunk, Sampled
from mi_runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepResults:
    """What a step gave, by sequence."""

    sampled: dict[Sequence, Sampled | None]  # None: nothing can be drawn
    scores: dict[Sequence, list[TokenLogprobs] | None]
    """Of the scored positions of a chunk; None where logits are not finite."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of a chunk's scored positions, on the device."""

    finite: Tensor  # [1] int32: whether all logits are
    logprobs: RowLogprobs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.finite, *self.logprobs.tensors

    @staticmethod
    def read(host: Iterator[Tensor]) -> list[TokenLogprobs] | None:
        finite, logprobs = next(host), read_logprobs(host)
        return logprobs if finite.item() else None


class InFlightStep:
    """One step on its way through the device."""

    def __init__(
        self,
        chunks: list[Chunk],
        sequences: list[Sequence],
        logits: list[Tensor],
        scores: dict[Sequence, PromptScores],
    ) -> None:
        self.chunks = chunks
        self._sequences = sequences  # that sample, one a row
        self._logits = logits  # [rows, vocabulary], in one piece a part
        self._scores = scores
        self._output: SamplerOutput | None = None
        self._readback: Readback | None = None

    def sample(self, sampler: Sampler, device: torch.device) -> None:
        """Draws for the sequences that have not ended since the launch."""
        rows = [row for row, one in enumerate(self._sequences) if not one.ended]
        tensors = [one for score in self._scores.values() for one in score.tensors]
        if rows:
            logits = self._logits[0] if len(self._logits) == 1 else torch.cat(self._logits)
            if len(rows) < len(logits):
                logits = logits.index_select(0, on_device(rows, torch.int64, device))
            self._output = sampler.sample(logits, tuple(self._sequences[row] for row in rows))
            tensors += self._output.tensors
        self._logits = []
        self._readback = Readback(tensors, device)

    @property
    def sampled_rows(self) -> dict[Sequence, int]:
        """Where the token of each sequence stands among the drawn ones."""
        drawn = () if self._output is None else self._output.sequences
        return {one: row for row, one in enumerate(drawn)}

    def sampled_tokens(self, rows: Tensor) -> Tensor:
        """Those of the drawn tokens, int64; all on the device."""
        assert self._output is not None
        return self._output.tokens.index_select(0, rows)

    def results(self) -> StepResults:
        """Waits for the step to be computed; once."""
        assert self._readback is not None, "not sampled"
        host = self._readback.wait()
        scores = {sequence: PromptScores.read(host) for sequence in self._scores}
        if self._output is None:
            return StepResults({}, scores)
        sampled = zip(self._output.sequences, self._output.read(host), strict=True)
        return StepResults(dict(sampled), scores)


def score_prompt(logits: Tensor, chunk: Chunk) -> PromptScores:
    """Of the token behind each scored position."""
    sequence, scored = chunk.sequence, chunk.scored
    behind = sequence.tokens[scored.start + 1 : scored.stop + 1]
    tokens = on_device(behind, torch.int64, logits.device)
    count = sequence.request.sampling.prompt_logprobs or 0
    finite = logits.amax().isfinite() & logits.amin().isfinite()
    return PromptScores(finite.int().view(1), token_logprobs(logits, tokens, count))
