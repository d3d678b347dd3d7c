"""Runs steps on the device: chunks in, a sampled token for each that reaches its end out.

A step is launched, sampled and read. Nothing is waited for until it is read, so that the host can
launch a step, read the one before, and then sample: what is computed for a sequence depends on its
tokens, which the device has, and what is drawn on all that the host makes of them. The logits of
scored prompt positions become log-probabilities part by part, and are not kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_runtime.attention import AttentionBackend, PagedAttention
from mi_runtime.batch import NOTHING_DRAWN, Batch, build_batch
from mi_runtime.graphs import DecodeGraphs
from mi_runtime.load import BlendedModel
from mi_runtime.logprobs import RowLogprobs, read_logprobs, token_logprobs
from mi_runtime.planner import Part, Planner
from mi_runtime.request import TokenLogprobs
from mi_runtime.sampler import Draw, Sampler
from mi_runtime.scheduler import Chunk, Sampled
from mi_runtime.sequence import Sequence
from mi_runtime.transfer import Readback, on_device


@dataclass(frozen=True, slots=True)
class Results:
    """What a step gave, by sequence."""

    sampled: dict[Sequence, Sampled | None]  # None: nothing can be drawn
    scores: dict[Sequence, list[TokenLogprobs] | None]
    """Of the scored positions of a chunk; None where logits are not finite."""


@dataclass(frozen=True, slots=True)
class Score:
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


class Flight:
    """One step on its way through the device."""

    def __init__(
        self,
        chunks: list[Chunk],
        sequences: list[Sequence],
        logits: list[Tensor],
        scores: dict[Sequence, Score],
    ) -> None:
        self.chunks = chunks
        self._sequences = sequences  # that sample, one a row
        self._logits = logits  # [rows, vocabulary], in one piece a part
        self._scores = scores
        self._draw: Draw | None = None
        self._readback: Readback | None = None

    def sample(self, sampler: Sampler, device: torch.device) -> None:
        """Draws for the sequences that have not ended since the launch."""
        rows = [row for row, one in enumerate(self._sequences) if not one.ended]
        tensors = [one for score in self._scores.values() for one in score.tensors]
        if rows:
            logits = self._logits[0] if len(self._logits) == 1 else torch.cat(self._logits)
            if len(rows) < len(logits):
                logits = logits.index_select(0, on_device(rows, torch.int64, device))
            self._draw = sampler.sample(logits, tuple(self._sequences[row] for row in rows))
            tensors += self._draw.tensors
        self._logits = []
        self._readback = Readback(tensors, device)

    @property
    def row_of(self) -> dict[Sequence, int]:
        """Where the token of each sequence stands among the drawn ones."""
        drawn = () if self._draw is None else self._draw.sequences
        return {one: row for row, one in enumerate(drawn)}

    def tokens_at(self, rows: Tensor) -> Tensor:
        """Those of the drawn tokens, int64; all on the device."""
        assert self._draw is not None
        return self._draw.tokens.index_select(0, rows)

    def results(self) -> Results:
        """Waits for the step to be computed; once."""
        assert self._readback is not None, "not sampled"
        host = self._readback.wait()
        scores = {sequence: Score.read(host) for sequence in self._scores}
        if self._draw is None:
            return Results({}, scores)
        sampled = zip(self._draw.sequences, self._draw.read(host), strict=True)
        return Results(dict(sampled), scores)


class Runner:
    """The model, the KV of `num_blocks` blocks, the planner and the sampler."""

    def __init__(
        self,
        model: BlendedModel,
        planner: Planner,
        num_blocks: int,
        block_size: int,
        attention: AttentionBackend | None = None,
    ) -> None:
        self.planner = planner
        self.graphs: DecodeGraphs | None = None  # recorded once the KV is there
        self.attention = PagedAttention(
            model.layers, num_blocks, block_size, model.dtype, model.device, attention
        )
        self._model = model
        self._sampler = Sampler()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], before: Flight | None = None) -> Flight:
        """Has the device compute KV and logits; to be sampled before the next launch.

        `before`: the flight in which the tokens are drawn of sequences that run ahead.
        """
        sequences: list[Sequence] = []
        logits: list[Tensor] = []
        scores: dict[Sequence, Score] = {}
        parts = self.planner.plan(chunks)
        drawn = NOTHING_DRAWN if before is None else before.row_of
        for part in parts:
            batch, rows = self._forward(part, before, drawn)
            if batch.scored:
                rows = self._score(rows, batch, scores)
            elif self.graphs is not None and len(parts) > 1:
                rows = rows.clone()  # a replay's hold until the next one
            logits.append(rows)
            sequences += batch.sampling
        return Flight(chunks, sequences, logits, scores)

    @torch.inference_mode()
    def sample(self, flight: Flight) -> None:
        """Has the device draw a token of each chunk that samples, and send all results."""
        flight.sample(self._sampler, self._model.device)

    def _forward(
        self, part: Part, before: Flight | None, drawn: Mapping[Sequence, int]
    ) -> tuple[Batch, Tensor]:
        attention, model, graphs = self.attention, self._model, self.graphs
        size, spare = attention.block_size, attention.spare_block
        batch = build_batch(part, size, spare, model.device, drawn)
        if batch.ahead is not None:
            assert before is not None
            batch.ids.index_copy_(0, batch.ahead.rows, before.tokens_at(batch.ahead.drawn))
        form = None if graphs is None else graphs.form_for(part)
        if graphs is not None and form is not None:
            return batch, graphs.replay(form, batch)
        attention.begin(batch.attention)
        model.groups.begin(batch.rows)
        return batch, model.logits(batch.ids, batch.positions, batch.kept, attention)

    def _score(self, logits: Tensor, batch: Batch, scores: dict[Sequence, Score]) -> Tensor:
        """Reads the scored rows; returns the others."""
        start = 0
        for chunk in batch.scored:
            end = start + len(chunk.scored)
            scores[chunk.sequence] = _score(logits[start:end], chunk)
            start = end
        return logits[start:].clone()  # a view would keep them all


def _score(logits: Tensor, chunk: Chunk) -> Score:
    """Of the token behind each scored position."""
    sequence, scored = chunk.sequence, chunk.scored
    behind = sequence.tokens[scored.start + 1 : scored.stop + 1]
    tokens = on_device(behind, torch.int64, logits.device)
    count = sequence.request.sampling.prompt_logprobs or 0
    finite = logits.amax().isfinite() & logits.amin().isfinite()
    return Score(finite.int().view(1), token_logprobs(logits, tokens, count))
