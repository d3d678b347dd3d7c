"""Runs steps on the device: chunks in, a sampled token for each that reaches its end out.

A step is launched, sampled and read. Nothing is waited for until it is read, so that the host can
launch a step, read the previous one, and then sample: a forward pass needs only token ids, which
the device has, and sampling needs what the host derives from them. The logits of scored prompt
positions become log-probabilities sub-batch by sub-batch, and are not kept.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.plan import AttentionBackend
from mi_runtime.execution.batch import NOTHING_SAMPLED, Batch, build_batch
from mi_runtime.execution.decode_graphs import DecodeGraphs
from mi_runtime.execution.in_flight_step import InFlightStep, PromptScores, score_prompt
from mi_runtime.execution.sampler import Sampler
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import Planner, SubBatch
from mi_runtime.scheduling.sequence import Sequence


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
    def launch(self, chunks: list[Chunk], previous: InFlightStep | None = None) -> InFlightStep:
        """Has the device compute KV and logits; to be sampled before the next launch.

        `before`: the step in which the tokens are drawn of sequences that run ahead.
        """
        sequences: list[Sequence] = []
        logits: list[Tensor] = []
        scores: dict[Sequence, PromptScores] = {}
        sub_batches = self.planner.plan(chunks)
        drawn = NOTHING_SAMPLED if previous is None else previous.sampled_rows
        for sub_batch in sub_batches:
            batch, rows = self._forward(sub_batch, previous, drawn)
            if batch.scored:
                rows = self._score(rows, batch, scores)
            elif self.graphs is not None and len(sub_batches) > 1:
                rows = rows.clone()  # a replay's hold until the next one
            logits.append(rows)
            sequences += batch.sampling
        return InFlightStep(chunks, sequences, logits, scores)

    @torch.inference_mode()
    def sample(self, step: InFlightStep) -> None:
        """Has the device draw a token of each chunk that samples, and send all results."""
        step.sample(self._sampler, self._model.device)

    def _forward(
        self, sub_batch: SubBatch, previous: InFlightStep | None, drawn: Mapping[Sequence, int]
    ) -> tuple[Batch, Tensor]:
        attention, model, graphs = self.attention, self._model, self.graphs
        size, null_block = attention.block_size, attention.null_block
        batch = build_batch(sub_batch, size, null_block, model.device, drawn)
        if batch.placeholders is not None:
            assert previous is not None
            batch.ids.index_copy_(
                0, batch.placeholders.rows, previous.sampled_tokens(batch.placeholders.sampled_rows)
            )
        key = None if graphs is None else graphs.key_for(sub_batch)
        if graphs is not None and key is not None:
            return batch, graphs.replay(key, batch)
        attention.begin(batch.attention)
        model.groups.begin(batch.rows)
        return batch, model.logits(batch.ids, batch.positions, batch.logits_indices, attention)

    def _score(self, logits: Tensor, batch: Batch, scores: dict[Sequence, PromptScores]) -> Tensor:
        """Reads the scored rows; returns the others."""
        start = 0
        for chunk in batch.scored:
            end = start + len(chunk.scored)
            scores[chunk.sequence] = score_prompt(logits[start:end], chunk)
            start = end
        return logits[start:].clone()  # a view would keep them all
