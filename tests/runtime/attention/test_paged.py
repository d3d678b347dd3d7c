"""Paged attention agrees with its reference, which sees complete sequences and has no cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mi_runtime.attention.paged import attention_forward
from mi_runtime.attention.plan import LayerShape
from mi_runtime.attention.reference import PackedAttention
from mi_runtime.errors import UnsupportedModel
from mi_runtime.scheduling.chunk import Chunk
from tests.runtime.paged import (
    KEY_DIM,
    LAYERS,
    NUM_BLOCKS,
    VALUE_DIM,
    Workload,
    attention,
    attention_plan,
    by_paged_attention,
    by_reference,
    poison,
    rows_of,
    sequences,
    shuffled_blocks,
)

workloads = st.builds(
    Workload,
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5).map(tuple),
    block_size=st.sampled_from([1, 4, 16]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 5, 100]),
    sinks=st.sampled_from(["none", "shared", "by row"]),
    budget=st.sampled_from([1, 6, 100]),
).filter(lambda work: sum(-(-one // work.block_size) for one in work.lengths) <= NUM_BLOCKS)


@given(work=workloads)
def test_paged_attention_agrees_with_its_reference(work: Workload) -> None:
    out = by_paged_attention(work, attention(work), sequences(work, shuffled_blocks(work.seed)))
    torch.testing.assert_close(out, by_reference(work), atol=2e-6, rtol=1e-5)


@given(work=workloads)
@settings(max_examples=settings.default.max_examples // 2)
def test_stale_kv_of_a_block_never_reaches_its_next_sequence(work: Workload) -> None:
    """A sequence that ends during its prefill leaves its keys and values in its blocks."""
    over = attention(work)
    poison(over, work)
    out = by_paged_attention(work, over, sequences(work, shuffled_blocks(work.seed)))
    torch.testing.assert_close(out, by_reference(work), atol=2e-6, rtol=1e-5)


def test_every_layer_has_its_own_keys_and_values() -> None:
    work = Workload()
    over, blocks = attention(work), shuffled_blocks(0)
    for layer in range(LAYERS):
        out = by_paged_attention(work, over, sequences(work, list(blocks)), layer)
        torch.testing.assert_close(out, by_reference(work), atol=2e-6, rtol=1e-5)


def test_a_shared_prefix_is_read_and_not_written() -> None:
    """The second sequence uses the first one's blocks, as after a prefix cache hit."""
    work = Workload(lengths=(8, 11), budget=100)
    query, key, value, _ = work.tensors()
    key[8:16], value[8:16] = key[:8], value[:8]
    over, (first, second) = attention(work), sequences(work, shuffled_blocks(1))
    second.block_table[:2] = first.block_table
    second.computed = 8
    for chunk in (Chunk(first, 0, 8), Chunk(second, 8, 3)):
        rows = rows_of(work, [chunk])
        over.begin(attention_plan([chunk], 4, over.null_block))
        out = over.attend(
            0, query[rows], key[rows], value[rows], scale=0.3, window=None, sinks=None
        )
    reference = PackedAttention(work.lengths)
    expected = reference.attend(0, query, key, value, scale=0.3, window=None, sinks=None)
    torch.testing.assert_close(out, expected[16:], atol=2e-6, rtol=1e-5)


def test_the_reference_agrees_with_the_formula_of_attention() -> None:
    work = Workload(lengths=(6,), kv_heads=1, group=2, window=3, sinks="shared")
    query, key, value, sinks = work.tensors()
    assert sinks is not None
    out = by_reference(work)
    for row in range(6):
        for head in range(2):
            seen = slice(max(0, row - 2), row + 1)
            scores = key[seen, 0] @ query[row, head] * 0.3
            weights = torch.cat((scores, sinks[head : head + 1])).softmax(0)[:-1]
            torch.testing.assert_close(out[row, head], weights @ value[seen, 0])


class Layer(nn.Module):
    layer_idx = 1


@pytest.mark.parametrize("argument", ["softcap", "head_mask", "position_bias"])
def test_an_argument_that_would_change_the_result_is_refused_by_name(argument: str) -> None:
    x = torch.zeros(1, 2, 3, KEY_DIM)
    reference = PackedAttention((3,))
    with pytest.raises(UnsupportedModel, match=argument):
        attention_forward(
            Layer(), x, x, x, None, attention_context=reference, scaling=1.0, **{argument: 30.0}
        )


def test_a_mask_of_the_models_own_is_refused() -> None:
    x = torch.zeros(1, 2, 3, KEY_DIM)
    reference = PackedAttention((3,))
    with pytest.raises(UnsupportedModel, match="mask"):
        attention_forward(
            Layer(), x, x, x, torch.ones(3, 3), attention_context=reference, scaling=1.0
        )


def test_the_reference_records_the_shape_of_every_layer() -> None:
    work, reference = Workload(lengths=(3,), sinks="shared"), PackedAttention((3,))
    query, key, value, sinks = work.tensors()
    reference.attend(4, query, key, value, scale=1.0, window=None, sinks=None)
    reference.attend(5, query, key, value, scale=1.0, window=7, sinks=sinks)
    plain = LayerShape(kv_heads=2, key_dim=KEY_DIM, value_dim=VALUE_DIM, heads=4)
    assert reference.shapes == {4: plain, 5: replace(plain, window=7, sinks=True)}
