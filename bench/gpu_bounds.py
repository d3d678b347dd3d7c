"""The least that a row of the GPU bench must read and compute, and the time that takes on a card.

    seconds ≥ max(bytes / bandwidth, operations / rate)

The bytes of a decode step are the weights, read once for all rows in the way they are computed, and
the KV of every row. Only matrices and KV are counted. Norms, activations, logits and the scales of
deltas (under 2 % of their bytes) are not, so a share of the bound is never too high. Of experts,
those are counted that the rows are expected to use if each row chose at random. Operations are two
for each weight and row (a multiply and an add), twice that for the pair product, and four for each
position, head and dimension of attention.

Plain numbers in bytes, operations and seconds; no tensors. Weights and KV have two bytes each, so
the bounds of a run in fp32 mean nothing.
"""

from dataclasses import dataclass
from typing import Final, Literal

Store = Literal["static", "pair", "int8", "int4"]
ITEM: Final = 2  # bytes of a weight and of a number of the KV
DIFFERENCE: Final = {"pair": 2.0, "int8": 1.0, "int4": 0.5}  # bytes a weight, without Instruct's


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a model like Qwen3, or of one GPU's part of it. `experts` 0 means dense."""

    layers: int
    hidden: int
    inner: int  # width of the MLP, or of each expert
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: int = 0
    chosen: int = 0  # experts for each token

    @property
    def attention(self) -> int:
        """Weights of the four projections of a layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp(self) -> int:
        """Weights of a layer's MLP, or of one expert."""
        return 3 * self.hidden * self.inner

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def router(self) -> int:
        return self.experts * self.hidden

    @property
    def weights(self) -> int:
        """Weights of all matrices; a tied one counts once."""
        layer = self.attention + self.router + self.mlp * max(1, self.experts)
        return self.layers * layer + self.head * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's KV, in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM

    def read(self, rows: float) -> float:
        """Weights that a step of so many rows reads, without the few rows of the embedding."""
        used = experts_hit(self.experts, self.chosen, rows) if self.experts else 1.0
        return self.layers * (self.attention + self.router + self.mlp * used) + self.head

    def multiplied(self, rows: float, kept: float) -> float:
        """Weights times rows; `kept` rows reach the head."""
        layer = self.attention + self.router + self.mlp * max(1, self.chosen)
        return rows * self.layers * layer + kept * self.head


SHAPES: Final = {
    "4b": Shape(36, 2560, 9728, 32, 8, 128, 151_936, tied=True),
    "8b": Shape(36, 4096, 12_288, 32, 8, 128, 151_936, tied=False),
    "30b-a3b": Shape(48, 2048, 768, 32, 4, 128, 151_936, tied=False, experts=128, chosen=8),
    # A fourth of the model, except for the head.
    "70b-tp4": Shape(80, 8192, 7168, 16, 2, 128, 128_256, tied=False),
}
TINY: Final = {
    **dict.fromkeys(("4b", "8b", "70b-tp4"), Shape(2, 64, 96, 4, 2, 16, 512, tied=True)),
    "30b-a3b": Shape(2, 64, 32, 4, 2, 16, 512, tied=False, experts=8, chosen=2),
}


def experts_hit(experts: int, chosen: int, rows: float) -> float:
    """Returns the expected number of experts in use if each of `rows` rows chooses `chosen`
    different ones.
    """
    missed: float = (1 - chosen / experts) ** rows
    return experts * (1 - missed)


@dataclass(frozen=True, slots=True)
class Way:
    """How weights are computed: the bytes read for each, and the products with each."""

    bytes_a_weight: float
    products: int


def way_of(store: Store, one_lambda: bool) -> Way:
    """Returns the way of a row's λ values: one λ has its own weights, blended or merged; several
    take the pair product.
    """
    if store == "static" or one_lambda:
        return Way(ITEM, 1)
    return Way(ITEM + DIFFERENCE[store], 2)


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes moved and operations done."""

    bytes: float
    operations: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def times(self, count: float) -> "Work":
        return Work(self.bytes * count, self.operations * count)


def decode_work(shape: Shape, way: Way, rows: int, context: float) -> Work:
    """The work of one step of `rows` sequences that have `context` tokens each."""
    weights = shape.read(rows) * way.bytes_a_weight
    products = 2 * way.products * shape.multiplied(rows, kept=rows)
    return Work(
        weights + rows * context * shape.kv_bytes,
        products + rows * context * _attention(shape),
    )


def prefill_work(shape: Shape, way: Way, sequences: int, tokens: int) -> Work:
    """The work of prompts of `tokens` each, as if in one forward. The last token of each reaches
    the head.
    """
    rows = sequences * tokens
    seen = sequences * tokens * (tokens + 1) / 2  # positions that rows attend to, causally
    return Work(
        shape.read(rows) * way.bytes_a_weight + rows * shape.kv_bytes,
        2 * way.products * shape.multiplied(rows, kept=sequences) + seen * _attention(shape),
    )


def answer_work(shape: Shape, way: Way, sequences: int, prompt: int, answer: int) -> Work:
    """The work of prompts and their answers. The prefill gives the first token of each answer."""
    steps = decode_work(shape, way, sequences, prompt + answer / 2).times(answer - 1)
    return prefill_work(shape, way, sequences, prompt) + steps


def _attention(shape: Shape) -> float:
    """Operations of one row for each position it sees: a score, and a weighted sum."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim


@dataclass(frozen=True, slots=True)
class Card:
    """What the card does at best, measured in the same run or as published by its maker."""

    bandwidth: float  # bytes a second of a copy, read and written
    rate: float  # operations a second of a large matrix product
    measured: bool = True

    def bound(self, work: Work) -> tuple[float, Literal["bytes", "operations"]]:
        """Returns the least seconds, and which of the two sets them."""
        moving, computing = work.bytes / self.bandwidth, work.operations / self.rate
        return (moving, "bytes") if moving >= computing else (computing, "operations")


NOMINAL: Final = {  # by a part of the device's name
    "H100": Card(3.35e12, 989e12, measured=False),
    "H200": Card(4.8e12, 989e12, measured=False),
}


def card_named(device: str) -> Card | None:
    """Returns the maker's figures of a device, or None if it is not known here."""
    return next((card for name, card in NOMINAL.items() if name in device), None)
