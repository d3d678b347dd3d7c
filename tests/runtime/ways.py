"""Planners for tests, which check that an engine's answers do not depend on its planner."""

import random

from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch


class PairPlanner:
    """Plans every step as one forward by the pair product."""

    def plan(self, chunks: list[Chunk]) -> list[SubBatch]:
        return [SubBatch(chunks, blended=False)]


class RandomPlanner:
    """Groups a step's chunks at random, into one forward or several, of any way."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.parts = 0
        self.steps = 0

    def plan(self, chunks: list[Chunk]) -> list[SubBatch]:
        groups = self._by_dial(chunks) if self._random.random() < 0.5 else self._at_random(chunks)
        self._random.shuffle(groups)
        self.steps += 1
        self.parts += len(groups)
        return [SubBatch(group, self._random.random() < 0.6) for group in groups]

    def _by_dial(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        dials = dict.fromkeys(chunk.dial for chunk in chunks)  # a set has no fixed order
        return [[chunk for chunk in chunks if chunk.dial == dial] for dial in dials]

    def _at_random(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        count = self._random.randint(1, len(chunks))
        groups: list[list[Chunk]] = [[] for _ in range(count)]
        for chunk in chunks:
            self._random.choice(groups).append(chunk)
        return [group for group in groups if group]
