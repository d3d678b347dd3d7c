"""The dimensions of the models that are measured, and the sizes that follow from them.

Plain numbers; no tensors. Weights and KV have two bytes each.
"""

from dataclasses import dataclass
from typing import Final, Literal

Store = Literal["static", "pair", "int8", "int4"]
"""How a model is stored: one checkpoint, both endpoints, or Instruct and a rounded delta."""
ITEM: Final = 2  # bytes of a weight and of a number of the KV


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
        """The weights of the four projections of a layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp(self) -> int:
        """The weights of a layer's MLP, or of one expert."""
        return 3 * self.hidden * self.inner

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def router(self) -> int:
        return self.experts * self.hidden

    @property
    def weights(self) -> int:
        """The weights of all matrices; a tied one counts once."""
        layer = self.attention + self.router + self.mlp * max(1, self.experts)
        return self.layers * layer + self.head * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """The bytes of one token's KV in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM

    def read(self, rows: float) -> float:
        """Returns the weights that a step of so many rows reads, without those of the embedding."""
        used = experts_hit(self.experts, self.chosen, rows) if self.experts else 1.0
        return self.layers * (self.attention + self.router + self.mlp * used) + self.head

    def multiplied(self, rows: float, kept: float) -> float:
        """Returns weights times rows; only `kept` rows reach the head."""
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
    """Returns the expected number of experts in use by `rows` rows that choose at random."""
    missed: float = (1 - chosen / experts) ** rows
    return experts * (1 - missed)
