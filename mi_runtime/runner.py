"""Runs one step on the device: chunks in, a sampled token for each that reaches its end out."""

import torch

from mi_runtime.attention import PagedAttention
from mi_runtime.batch import build_batch
from mi_runtime.load import BlendedModel
from mi_runtime.sampler import Sampler
from mi_runtime.scheduler import Chunk, Sampled


class Runner:
    """The model, the KV of `num_blocks` blocks, and the sampler."""

    def __init__(self, model: BlendedModel, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._attention = PagedAttention(
            model.layers, num_blocks, block_size, model.dtype, model.device
        )
        self._sampler = Sampler()
        self.endpoint_steps = 0
        self.pair_steps = 0

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Sampled | None]:
        """One of each chunk that samples, in order; None where the logits are not finite."""
        attention, model = self._attention, self._model
        batch = build_batch(chunks, attention.block_size, attention.zero_block, model.device)
        attention.begin(batch.attention)
        model.lambdas.begin(batch.lambdas, batch.kept, batch.endpoint)
        logits = model.logits(batch.ids, batch.positions, batch.kept, attention)
        self._count(batch.endpoint)
        return self._sampler.sample(logits, batch.sampling) if batch.sampling else []

    def _count(self, endpoint: int | None) -> None:
        if endpoint is None:
            self.pair_steps += 1
        else:
            self.endpoint_steps += 1
