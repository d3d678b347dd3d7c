"""The bounds of the GPU bench, compared with numbers that can be computed by hand."""

from itertools import pairwise

import pytest

from bench.gpu.bounds import Card, Way, Work, answer_work, decode_work, prefill_work, way_of
from bench.models.shapes import SHAPES, Shape, experts_hit

DENSE, EXPERTS = SHAPES["4b"], SHAPES["30b-a3b"]
SINGLE, PAIR = Way(2, 1), Way(4, 2)


def test_the_shapes_have_the_weights_of_the_models_they_are_named_for() -> None:
    """Their model cards say 4.02 and 30.5 billion parameters; norms are not counted."""
    assert DENSE.weights == pytest.approx(4.022e9, rel=1e-3)
    assert EXPERTS.weights == pytest.approx(30.53e9, rel=1e-3)
    active = EXPERTS.multiplied(1, kept=1) + EXPERTS.head  # an embedding counts as active
    assert active == pytest.approx(3.35e9, rel=1e-2)


def test_kv_of_a_token_has_a_key_and_a_value_of_two_bytes_a_dimension() -> None:
    assert DENSE.kv_bytes == 36 * 8 * 128 * 2 * 2
    assert EXPERTS.kv_bytes == 48 * 4 * 128 * 2 * 2


def test_one_row_hits_its_own_experts_and_many_rows_hit_all() -> None:
    assert experts_hit(128, 8, 1) == 8
    assert experts_hit(128, 8, 2) == 8 + 8 * 120 / 128  # the second's, that the first had not
    assert experts_hit(128, 8, 10_000) == pytest.approx(128)
    rising = [experts_hit(128, 8, rows) for rows in range(1, 300)]
    assert all(one <= other for one, other in pairwise(rising))


def test_weights_are_read_once_and_multiplied_for_every_row() -> None:
    empty = [decode_work(DENSE, SINGLE, rows, context=0) for rows in (1, 32)]
    assert empty[0].bytes == empty[1].bytes == 2 * DENSE.weights  # a tied head is read once
    assert 32 * empty[0].operations == empty[1].operations == 32 * 2 * DENSE.weights


def test_kv_is_read_for_every_row_and_token() -> None:
    work = decode_work(DENSE, SINGLE, rows=32, context=1024)
    assert work.bytes - 2 * DENSE.weights == 32 * 1024 * DENSE.kv_bytes


@pytest.mark.parametrize(
    ("store", "one_lambda", "bytes_a_weight", "products"),
    [
        ("static", True, 2, 1),
        ("static", False, 2, 1),
        ("pair", True, 2, 1),
        ("pair", False, 4, 2),
        ("int8", False, 3, 2),
        ("int4", False, 2.5, 2),
        ("int4", True, 2, 1),
    ],
)
def test_each_store_reads_the_expected_bytes_a_weight(
    store: str, one_lambda: bool, bytes_a_weight: float, products: int
) -> None:
    assert way_of(store, one_lambda) == Way(bytes_a_weight, products)  # type: ignore[arg-type]


def test_the_pair_product_reads_and_multiplies_twice_as_much() -> None:
    single, pair = (decode_work(EXPERTS, way, 8, context=0) for way in (SINGLE, PAIR))
    assert (pair.bytes, pair.operations) == (2 * single.bytes, 2 * single.operations)


def test_a_prefill_sees_each_position_and_all_before_it() -> None:
    small = Shape(1, 8, 8, heads=2, kv_heads=1, head_dim=4, vocabulary=16, tied=True)
    work = prefill_work(small, SINGLE, sequences=2, tokens=3)
    linear = 2 * (2 * 3 * (small.attention + small.mlp) + 2 * small.head)
    attention = 2 * (1 + 2 + 3) * 4 * 2 * 4  # sequences, positions, and four operations each
    assert work.operations == linear + attention
    assert work.bytes == 2 * small.weights + 2 * 3 * small.kv_bytes


def test_an_answer_is_a_prefill_and_a_step_for_each_token_but_the_first() -> None:
    total = answer_work(DENSE, SINGLE, 4, prompt=10, answer=6)
    steps = [decode_work(DENSE, SINGLE, 4, context=13)] * 5
    assert total == sum(steps, start=prefill_work(DENSE, SINGLE, 4, tokens=10))


def test_the_bound_is_the_larger_of_two_times_and_names_it() -> None:
    card = Card(bandwidth=100.0, rate=1000.0)
    assert card.bound(Work(50, 10)) == (0.5, "bytes")
    assert card.bound(Work(50, 800)) == (0.8, "operations")
