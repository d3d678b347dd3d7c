"""Lengths of think blocks are observed by class and λ range, and cut blocks count as longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.routing.observed_lengths import LengthDigest, ObservedLengths

BLOCKS = st.lists(st.tuples(st.integers(0, 10_000), st.booleans()), min_size=1, max_size=60)


def digest(blocks: list[tuple[int, bool]]) -> LengthDigest:
    filled = LengthDigest()
    for tokens, cut in blocks:
        filled.add(tokens, cut=cut)
    return filled


def test_without_an_answer_mean_and_quantiles_are_unknown() -> None:
    assert (LengthDigest().samples, LengthDigest().mean, LengthDigest().quantile(0.9)) == (
        0,
        None,
        None,
    )


def test_quantiles_and_mean_are_those_of_the_blocks() -> None:
    filled = digest([(tokens, False) for tokens in range(101)])
    assert filled.quantile(0.5) == pytest.approx(50, abs=1)
    assert filled.quantile(0.9) == pytest.approx(90, abs=1)
    assert filled.mean == 50


def test_a_cut_block_counts_as_longer_than_any_other() -> None:
    complete = [(tokens, False) for tokens in range(100)]
    some = digest([*complete, *[(5, True)] * 100])
    assert some.quantile(0.4) == pytest.approx(80, abs=2)
    assert some.quantile(0.9) is None
    assert (some.samples, some.cut) == (200, 100)


@given(BLOCKS, st.floats(0.01, 1))
def test_a_quantile_is_known_unless_it_lies_among_the_cut_blocks(
    blocks: list[tuple[int, bool]], share: float
) -> None:
    complete = [tokens for tokens, cut in blocks if not cut]
    value = digest(blocks).quantile(share)
    assert (value is None) == (share * len(blocks) > len(complete))
    if value is not None:
        assert min(complete) - 1e-6 <= value <= max(complete) + 1e-6


@given(BLOCKS)
def test_the_mean_counts_the_tokens_of_cut_blocks_too(blocks: list[tuple[int, bool]]) -> None:
    assert digest(blocks).mean == pytest.approx(sum(tokens for tokens, _ in blocks) / len(blocks))


def test_classes_and_buckets_are_kept_apart_and_bounded() -> None:
    observations = ObservedLengths(["default", "math"])
    for cell in range(101):
        observations.add("math", cell / 100, 7, cut=False)
    filled = list(observations.filled())
    assert {name for name, _, _ in filled} == {"math"}
    assert len(filled) == 10
    assert observations.at("math", 0.65) is observations.at("math", 0.6)
    assert observations.at("default", 0.6).samples == 0
