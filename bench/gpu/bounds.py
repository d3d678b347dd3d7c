"""Computes the least time that a row of the GPU bench can take on a card.

    seconds ≥ max(bytes / bandwidth, operations / rate)

The bytes of a decode step are the weights, read once for all rows in the way they are computed, and
the KV of every row. Only matrices and KV are counted. Norms, activations, logits and the scales of
deltas (under 2 % of their bytes) are not, so a share of the bound is never too high. Only as many
experts are counted as rows that choose at random are expected to use. Operations are two for each
weight and row (a multiply and an add), twice that for the pair product, and four for each position,
head and dimension of attention.

Plain numbers in bytes, operations and seconds; no tensors. Weights and KV have two bytes each, so
the bounds of a run in fp32 mean nothing.
"""

from dataclasses import dataclass
from typing import Final, Literal

from bench.models.shapes import ITEM, Shape, Store

DIFFERENCE: Final = {"pair": 2.0, "int8": 1.0, "int4": 0.5}  # bytes a weight, without Instruct's


@dataclass(frozen=True, slots=True)
class Way:
    """How weights are computed: the bytes read for each, and the products with each."""

    bytes_a_weight: float
    products: int


def way_of(store: Store, one_lambda: bool) -> Way:
    """Returns how a row is computed: with one matrix at one λ, else by the pair product."""
    if store == "static" or one_lambda:
        return Way(ITEM, 1)
    return Way(ITEM + DIFFERENCE[store], 2)


@dataclass(frozen=True, slots=True)
class Work:
    """The bytes that a step moves, and the operations that it does."""

    bytes: float
    operations: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def times(self, count: float) -> "Work":
        return Work(self.bytes * count, self.operations * count)


def decode_work(shape: Shape, way: Way, rows: int, context: float) -> Work:
    """Returns the work of one step of `rows` sequences that have `context` tokens each."""
    weights = shape.read(rows) * way.bytes_a_weight
    products = 2 * way.products * shape.multiplied(rows, kept=rows)
    return Work(
        weights + rows * context * shape.kv_bytes,
        products + rows * context * _attention(shape),
    )


def prefill_work(shape: Shape, way: Way, sequences: int, tokens: int) -> Work:
    """Returns the work of prompts of `tokens` each, as if in one forward.

    The last token of each reaches the head.
    """
    rows = sequences * tokens
    seen = sequences * tokens * (tokens + 1) / 2  # positions that rows attend to, causally
    return Work(
        shape.read(rows) * way.bytes_a_weight + rows * shape.kv_bytes,
        2 * way.products * shape.multiplied(rows, kept=sequences) + seen * _attention(shape),
    )


def answer_work(shape: Shape, way: Way, sequences: int, prompt: int, answer: int) -> Work:
    """Returns the work of prompts and answers, whose first token comes from the prefill."""
    steps = decode_work(shape, way, sequences, prompt + answer / 2).times(answer - 1)
    return prefill_work(shape, way, sequences, prompt) + steps


def _attention(shape: Shape) -> float:
    """Returns the operations of a row for each position it sees: a score and a weighted sum."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim


@dataclass(frozen=True, slots=True)
class Card:
    """The best that a card can do, as measured in the same run or as published by its maker."""

    bandwidth: float  # bytes a second of a copy, read and written
    rate: float  # operations a second of a large matrix product
    measured: bool = True

    def bound(self, work: Work) -> tuple[float, Literal["bytes", "operations"]]:
        """Returns the least seconds, and which of the two sets them."""
        moving, computing = work.bytes / self.bandwidth, work.operations / self.rate
        return (moving, "bytes") if moving >= computing else (computing, "operations")


NOMINAL: Final = {  # keys are parts of a device's name
    "H100": Card(3.35e12, 989e12, measured=False),
    "H200": Card(4.8e12, 989e12, measured=False),
}


def card_named(device: str) -> Card | None:
    """Returns the maker's figures of a device, or None if it is not known here."""
    return next((card for name, card in NOMINAL.items() if name in device), None)
