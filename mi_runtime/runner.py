"""Runs one step on the device: chunks in, a sampled token for each that reaches its end out.

The logits of scored prompt positions become log-probabilities part by part, and are not kept.
"""

import torch
from torch import Tensor

from mi_runtime.attention import PagedAttention
from mi_runtime.batch import Batch, build_batch
from mi_runtime.graphs import DecodeGraphs
from mi_runtime.load import BlendedModel
from mi_runtime.logprobs import token_logprobs
from mi_runtime.planner import Part, Planner
from mi_runtime.request import TokenLogprobs
from mi_runtime.sampler import Sampler
from mi_runtime.scheduler import Chunk, Sampled
from mi_runtime.sequence import Sequence


class Runner:
    """The model, the KV of `num_blocks` blocks, the planner and the sampler."""

    def __init__(
        self, model: BlendedModel, planner: Planner, num_blocks: int, block_size: int
    ) -> None:
        self.planner = planner
        self.graphs: DecodeGraphs | None = None  # recorded once the KV is there
        self.attention = PagedAttention(
            model.layers, num_blocks, block_size, model.dtype, model.device
        )
        self._model = model
        self._sampler = Sampler()
        self.scores: dict[Sequence, list[TokenLogprobs] | None] = {}
        """Of the last run: the scored positions of its chunks; None where logits are not finite."""

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Sampled | None]:
        """One of each chunk that samples, in order; None where the logits are not finite."""
        sequences: list[Sequence] = []
        logits: list[Tensor] = []
        self.scores = {}
        parts = self.planner.plan(chunks)
        for part in parts:
            part_logits, sampling = self._forward(part)
            logits.append(part_logits if len(parts) == 1 else part_logits.clone())
            sequences += sampling
        if not sequences:
            return []
        together = logits[0] if len(logits) == 1 else torch.cat(logits)
        sampled = self._sampler.sample(together, tuple(sequences))
        if len(logits) == 1:
            return sampled
        of = dict(zip(sequences, sampled, strict=True))
        return [of[chunk.sequence] for chunk in chunks if chunk.samples]

    def _forward(self, part: Part) -> tuple[Tensor, tuple[Sequence, ...]]:
        """Logits of the rows that sample; those of a replay hold until the next one."""
        attention, model, graphs = self.attention, self._model, self.graphs
        batch = build_batch(part, attention.block_size, attention.spare_block, model.device)
        form = None if graphs is None else graphs.form_for(part)
        if graphs is not None and form is not None:
            return graphs.replay(form, batch), batch.sampling
        attention.begin(batch.attention)
        model.groups.begin(batch.rows)
        logits = model.logits(batch.ids, batch.positions, batch.kept, attention)
        if batch.scored:
            logits = self._score(logits, batch)
        return logits, batch.sampling

    def _score(self, logits: Tensor, batch: Batch) -> Tensor:
        """Reads the scored rows; returns the others."""
        start = 0
        for chunk in batch.scored:
            end = start + len(chunk.scored)
            self.scores[chunk.sequence] = _prompt_logprobs(logits[start:end], chunk)
            start = end
        return logits[start:].clone()  # a view would keep them all


def _prompt_logprobs(logits: Tensor, chunk: Chunk) -> list[TokenLogprobs] | None:
    """Of the token behind each scored position."""
    if not logits.isfinite().all():
        return None
    tokens = [chunk.sequence.tokens[position + 1] for position in chunk.scored]
    count = chunk.sequence.request.sampling.prompt_logprobs or 0
    return token_logprobs(logits, tokens, [count] * len(tokens))
