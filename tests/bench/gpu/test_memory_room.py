"""What fits on an H100 and an H200, by the sizes of the models."""

import pytest

from bench.gpu.cases import FULL, STORES, Skipped
from bench.gpu.memory_room import PLACES, RESERVE, room_for, tokens_of
from bench.models.shapes import SHAPES, Shape, Store

H100, H200 = 84e9, 149e9  # bytes free
DENSE, EXPERTS = SHAPES["4b"], SHAPES["30b-a3b"]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("card", [H100, H200])
def test_every_row_of_the_dense_model_fits_on_either_card(store: Store, card: float) -> None:
    room = room_for(DENSE, store, FULL, card)
    assert room.tokens >= max(tokens_of(*size, FULL) for size in FULL.decodes)
    assert room.places == (PLACES if store == "pair" else 0)


@pytest.mark.parametrize(("shape", "card"), [(DENSE, H100), (DENSE, H200), (EXPERTS, H200)])
@pytest.mark.parametrize("store", STORES)
def test_planned_memory_fits_on_the_card(shape: Shape, card: float, store: Store) -> None:
    room = room_for(shape, store, FULL, card)
    copies = {"static": 1, "pair": 2, "int8": 1.5, "int4": 1.25}[store] + room.places
    assert copies * 2 * shape.weights + room.tokens * shape.kv_bytes <= card - RESERVE


def test_a_pair_of_the_larger_model_needs_the_larger_card() -> None:
    with pytest.raises(Skipped, match="GB are needed, and 84 GB are free"):
        room_for(EXPERTS, "pair", FULL, H100)
    with pytest.raises(Skipped):
        room_for(EXPERTS, "int8", FULL, H100)  # as it is made of two full endpoints
    assert room_for(EXPERTS, "pair", FULL, H200).places == 0


def test_blend_bytes_hold_exactly_the_planned_places() -> None:
    room, copy = room_for(DENSE, "pair", FULL, H100), 2 * DENSE.weights
    assert room.blend_bytes is not None
    for graphs in (0.0, 2e9):
        assert room.blend_bytes // (copy + graphs) == room.places
