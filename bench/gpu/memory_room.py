"""Divides a device's memory among weights, blended weights and KV for the GPU bench.

A server takes all memory; a benchmark takes what its rows need, so that every engine of a process
finds room once the one before it is gone. Plain numbers, in bytes and tokens.
"""

from dataclasses import dataclass
from typing import Final

from bench.gpu.bounds import DIFFERENCE
from bench.gpu.cases import Scale, Skipped
from bench.models.shapes import ITEM, Shape, Store

RESERVE: Final = 6e9  # activations of the largest step, CUDA graphs, workspaces of libraries
PLACES: Final = 2  # λ values with blended weights: a hot one, and one that is new
TINY: Final = 1e9  # bytes of a copy of the weights
HOT_STEPS: Final = 200  # steps within which a single λ must have its blended weights
BLOCK: Final = 16  # tokens


@dataclass(frozen=True, slots=True)
class Room:
    tokens: int  # tokens of KV
    places: int  # places of the blend cache
    blend_bytes: int | None  # for blended weights and their graphs; None: the engine decides


def room_for(shape: Shape, store: Store, scale: Scale, free: float, item: int = ITEM) -> Room:
    """Divides `free` bytes, for numbers of `item` bytes.

    Raises Skipped if the first decode row does not fit, or if both endpoints in full do not, which
    are in memory while a pair is made.
    """
    copy, token = shape.weights * item, shape.kv_bytes * item / ITEM
    kept = copy * (1 if store == "static" else 1 + DIFFERENCE[store] / ITEM)
    making = copy * (1 if store == "static" else 2)
    left = free - RESERVE - kept
    least = tokens_of(*scale.decodes[0], scale)
    if free - RESERVE < making or left < least * token:
        needed = RESERVE + max(making, kept + least * token)
        raise Skipped(f"{needed / 1e9:.0f} GB are needed, and {free / 1e9:.0f} GB are free")
    places = int(min(PLACES, (left - least * token) // copy)) if store == "pair" else 0
    wanted = max(tokens_of(*size, scale) for size in scale.decodes)
    tokens = int(min(wanted, (left - places * copy) // token))
    # 1.4: more than so many places need with their CUDA graphs, and less than one more would need.
    # In a tiny model, CUDA graphs are the larger part.
    return Room(tokens, places, None if copy < TINY else int(1.4 * places * copy))


def tokens_of(sequences: int, context: int, scale: Scale) -> int:
    """Returns the tokens of KV that a decode row has at the end of its rounds."""
    return sequences * -(-(context + growth(scale)) // BLOCK) * BLOCK


def growth(scale: Scale) -> int:
    """Returns by how many tokens each context of a decode row may grow while it is measured."""
    return 1 + scale.warm + HOT_STEPS + scale.rounds * scale.steps
