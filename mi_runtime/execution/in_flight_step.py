"""A step in flight: it is launched, then sampled, then its results are read."""

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
    """The results of a step, by sequence."""

    sampled: dict[Sequence, Sampled | None]  # None: no token can be sampled
    scores: dict[Sequence, list[TokenLogprobs] | None]
    """Log-probabilities of a chunk's scored positions; None if their logits are not finite."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The log-probabilities of a chunk's scored positions, on the device."""

    finite: Tensor  # [1] int32: whether all logits are finite
    logprobs: RowLogprobs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that `read` needs on the host."""
        return self.finite, *self.logprobs.tensors

    @staticmethod
    def read(host: Iterator[Tensor]) -> list[TokenLogprobs] | None:
        """Reads the `tensors` of a PromptScores from the host."""
        finite, logprobs = next(host), read_logprobs(host)
        return logprobs if finite.item() else None


class InFlightStep:
    """One step that the device is computing: `sample` is called once, then `results` once."""

    def __init__(
        self,
        chunks: list[Chunk],
        sequences: list[Sequence],
        logits: list[Tensor],
        scores: dict[Sequence, PromptScores],
    ) -> None:
        self.chunks = chunks
        self._sequences = sequences  # those that sample, one per row
        self._logits = logits  # [rows, vocabulary] of each sub-batch
        self._scores = scores
        self._output: SamplerOutput | None = None
        self._readback: Readback | None = None

    def sample(self, sampler: Sampler, device: torch.device) -> None:
        """Samples a token for each sequence that has not ended since the launch."""
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
        """The row of each sequence among the sampled tokens."""
        sequences = () if self._output is None else self._output.sequences
        return {sequence: row for row, sequence in enumerate(sequences)}

    def sampled_tokens(self, rows: Tensor) -> Tensor:
        """Returns the sampled tokens of these rows, int64 on the device."""
        assert self._output is not None
        return self._output.tokens.index_select(0, rows)

    def results(self) -> StepResults:
        """Waits until the device has computed the step, and returns its results."""
        assert self._readback is not None, "not sampled"
        host = self._readback.wait()
        scores = {sequence: PromptScores.read(host) for sequence in self._scores}
        if self._output is None:
            return StepResults({}, scores)
        sampled = zip(self._output.sequences, self._output.read(host), strict=True)
        return StepResults(dict(sampled), scores)


def score_prompt(logits: Tensor, chunk: Chunk) -> PromptScores:
    """Returns the log-probabilities of the token after each scored position of `chunk`."""
    sequence, scored = chunk.sequence, chunk.scored
    following = sequence.tokens[scored.start + 1 : scored.stop + 1]
    tokens = on_device(following, torch.int64, logits.device)
    count = sequence.request.sampling.prompt_logprobs or 0
    finite = logits.amax().isfinite() & logits.amin().isfinite()
    return PromptScores(finite.int().view(1), token_logprobs(logits, tokens, count))
