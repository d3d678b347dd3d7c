"""Runs steps on the device: it takes chunks and gives a token for each chunk that samples.

A step is launched, sampled and read. Only reading waits for the device, so that the host can
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
    """Runs the model: it has the KV cache of `num_blocks` blocks, the planner and the sampler."""

    def __init__(
        self,
        model: BlendedModel,
        planner: Planner,
        num_blocks: int,
        block_size: int,
        attention: AttentionBackend | None = None,
    ) -> None:
        self.planner = planner
        self.graphs: DecodeGraphs | None = None  # captured after the KV cache is allocated
        self.attention = PagedAttention(
            model.layers, num_blocks, block_size, model.dtype, model.device, attention
        )
        self._model = model
        self._sampler = Sampler()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], previous: InFlightStep | None = None) -> InFlightStep:
        """Launches the forward passes of a step, which must be sampled before the next launch.

        `previous` is the step in flight, which samples the tokens that are not known yet.
        """
        sequences: list[Sequence] = []
        logits: list[Tensor] = []
        scores: dict[Sequence, PromptScores] = {}
        sub_batches = self.planner.plan(chunks)
        sampled_rows = NOTHING_SAMPLED if previous is None else previous.sampled_rows
        for sub_batch in sub_batches:
            batch, rows = self._forward(sub_batch, previous, sampled_rows)
            if batch.scored:
                rows = self._score(rows, batch, scores)
            elif self.graphs is not None and len(sub_batches) > 1:
                rows = rows.clone()  # the next replay overwrites them
            logits.append(rows)
            sequences += batch.sampling
        return InFlightStep(chunks, sequences, logits, scores)

    @torch.inference_mode()
    def sample(self, step: InFlightStep) -> None:
        """Launches the sampling of a step, and the copy of its results to the host."""
        step.sample(self._sampler, self._model.device)

    def _forward(
        self,
        sub_batch: SubBatch,
        previous: InFlightStep | None,
        sampled_rows: Mapping[Sequence, int],
    ) -> tuple[Batch, Tensor]:
        """Returns the batch of a sub-batch, and its logits `[rows with logits, vocabulary]`."""
        attention, model, graphs = self.attention, self._model, self.graphs
        size, null_block = attention.block_size, attention.null_block
        batch = build_batch(sub_batch, size, null_block, model.device, sampled_rows)
        if batch.placeholders is not None:
            assert previous is not None
            tokens = previous.sampled_tokens(batch.placeholders.sampled_rows)
            batch.ids.index_copy_(0, batch.placeholders.rows, tokens)
        if graphs is not None and (key := graphs.key_for(sub_batch)) is not None:
            return batch, graphs.replay(key, batch)
        attention.begin(batch.attention)
        model.groups.begin(batch.rows)
        return batch, model.logits(batch.ids, batch.positions, batch.logits_indices, attention)

    def _score(self, logits: Tensor, batch: Batch, scores: dict[Sequence, PromptScores]) -> Tensor:
        """Adds the scores of the scored rows to `scores`, and returns the other rows."""
        start = 0
        for chunk in batch.scored:
            end = start + len(chunk.scored)
            scores[chunk.sequence] = score_prompt(logits[start:end], chunk)
            start = end
        return logits[start:].clone()  # a view would keep all of them alive
