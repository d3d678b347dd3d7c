"""Each blend group of a step takes the right way, and every row has the λ of its own dial."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.row_lambdas import INSTRUCT, MEMO_ROWS, BlendGroups, Rows, StepRows, Way
from mi_runtime.model.swap import group_of
from mi_runtime.request import Dial

LAYERS = 2
NAMES = ("embed", "0.attn", "0.mlp", "1.attn", "1.mlp", "head")
E, B, P = Way.ENDPOINT, Way.BLENDED, Way.PAIR


def groups_of(places: int = 100) -> BlendGroups:
    return BlendGroups(LAYERS, torch.device("cpu"), BlendCache(places))


def step(*dials: Dial, blended: bool, tokens: int = 1) -> StepRows:
    """Returns the rows of a step: `tokens` of each dial in turn, of which the last has logits."""
    index = tuple(order for order in range(len(dials)) for _ in range(tokens))
    kept = tuple(tokens * order + tokens - 1 for order in range(len(dials)))
    return StepRows(dials, index, kept, blended)


def ways(groups: BlendGroups) -> dict[str, Way]:
    return {name: groups.slot(name, logits_only=False).rows.way for name in NAMES}


def every(way: Way, **others: Way) -> dict[str, Way]:
    """Returns one way for all groups but those given, whose names have `_` instead of a dot."""
    different = {name.removeprefix("l").replace("_", "."): one for name, one in others.items()}
    return {name: different.get(name, way) for name in NAMES}


def test_the_groups_are_the_embedding_two_a_layer_and_the_head() -> None:
    assert groups_of().names == NAMES


# --- Ways ---------------------------------------------------------------------------------------

SPLIT = Dial(0.3, (("0.attn", 0.0), ("1.mlp", 1.0), ("head", 0.7)))


@pytest.mark.parametrize(
    ("dials", "blended", "expected"),
    [
        ((Dial(0.0),), False, every(E)),
        ((Dial(1.0),), True, every(E)),
        ((Dial(0.3),), False, every(P)),
        ((Dial(0.3),), True, every(B)),
        ((Dial(0.3), Dial(0.4)), True, every(P)),
        ((Dial(0.0), Dial(1.0)), True, every(P)),
        ((SPLIT,), False, every(P, l0_attn=E, l1_mlp=E)),
        ((SPLIT,), True, every(B, l0_attn=E, l1_mlp=E)),
        ((SPLIT, Dial(0.3)), True, every(B, l0_attn=P, l1_mlp=P, head=P)),
        ((SPLIT, Dial(0.0)), True, every(P, l0_attn=E)),
        ((SPLIT, Dial(0.0)), False, every(P, l0_attn=E)),
        ((Dial(0.0, (("head", 0.5),)), Dial(1.0, (("head", 0.5),))), True, every(P, head=B)),
    ],
)
def test_each_group_takes_its_own_way(
    dials: tuple[Dial, ...], blended: bool, expected: dict[str, Way]
) -> None:
    groups = groups_of()
    groups.begin(step(*dials, blended=blended, tokens=3))
    assert ways(groups) == expected
    assert groups.executions == {way: Counter(expected.values())[way] for way in Way}


ANY_DIAL = st.builds(
    Dial.on_grid,
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.just(0.1),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.2, 0.9, 1.0])),
)


@given(
    dials=st.lists(ANY_DIAL, min_size=1, max_size=3, unique=True),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    blended=st.booleans(),
)
def test_every_row_has_the_λ_of_its_own_dial_in_every_group(
    dials: list[Dial], order: list[int], blended: bool
) -> None:
    index = tuple(one % len(dials) for one in order)
    dials = [dials[one] for one in dict.fromkeys(index)]  # in the order of the rows
    index = tuple(list(dict.fromkeys(index)).index(one) for one in index)
    kept = tuple(range(0, len(index), 2))
    groups = groups_of()
    groups.begin(StepRows(tuple(dials), index, kept, blended))
    for name in NAMES:
        values = [dials[one].value_of(name) for one in index]
        for is_kept, wanted in ((False, values), (True, [values[row] for row in kept])):
            rows = groups.slot(name, is_kept).rows
            shown = rows.lambdas.expand(len(wanted)) if len(rows.lambdas) == 1 else rows.lambdas
            torch.testing.assert_close(shown, torch.tensor(wanted))
            assert (rows.way is E) == (len(set(values)) == 1 and values[0] in (0.0, 1.0))
            assert rows.blend is None or {rows.blend.value} == set(values)


def test_λ_1_uses_pair_or_blended_weights_with_deltas() -> None:
    """This is λ = 1 if Thinking is stored as a rounded delta."""
    groups = BlendGroups(LAYERS, torch.device("cpu"), BlendCache(2), {0.0: INSTRUCT})
    for dial, blended, way in (
        (Dial(1.0), False, P),
        (Dial(1.0), True, B),
        (Dial(0.0), True, E),
    ):
        groups.begin(step(dial, blended=blended))
        assert ways(groups) == every(way)
    groups.begin(step(SPLIT, blended=True))
    assert ways(groups) == every(B, l0_attn=E)


def test_blended_groups_are_used_from_the_cache_by_group_and_λ() -> None:
    groups = groups_of()
    groups.begin(step(SPLIT, blended=True))
    used = [("embed", 0.3), ("0.mlp", 0.3), ("1.attn", 0.3), ("head", 0.7)]
    assert groups.cache.missing(used) == 0
    assert groups.cache.builds == len(used)
    for group, value in used:
        assert groups.slot(group, logits_only=False).rows.blend is groups.cache.use((group, value))


# --- From step to step --------------------------------------------------------------------------


def slots(groups: BlendGroups) -> list[Rows]:
    return [groups.slot(name, kept).rows for name in NAMES for kept in (False, True)]


@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize("dials", [(Dial(0.3),), (SPLIT,), (SPLIT, Dial(0.3))])
def test_the_same_batch_keeps_its_rows(dials: tuple[Dial, ...], blended: bool) -> None:
    groups = groups_of()
    groups.begin(step(*dials, blended=blended))
    before = slots(groups)
    groups.begin(step(*dials, blended=blended))
    assert all(one is two for one, two in zip(before, slots(groups), strict=True))


@pytest.mark.parametrize(
    "other",
    [
        step(Dial(0.3), Dial(0.41), blended=True),
        step(Dial(0.4), Dial(0.3), blended=True),
        step(Dial(0.3), Dial(0.4), blended=False),
        step(Dial(0.3), Dial(0.4), blended=True, tokens=2),
        StepRows((Dial(0.3), Dial(0.4)), (0, 1), (0,), True),
        StepRows((Dial(0.3), Dial(0.4)), (1, 0), (0, 1), True),
    ],
)
def test_a_different_batch_gets_new_rows(other: StepRows) -> None:
    first, groups = step(Dial(0.3), Dial(0.4), blended=True), groups_of()
    groups.begin(first)
    before = slots(groups)
    groups.begin(other)
    assert not any(one is two for one, two in zip(before, slots(groups), strict=True))
    groups.begin(first)
    assert [rows.lambdas.tolist() for rows in slots(groups)] == [
        rows.lambdas.tolist() for rows in before
    ]


def test_after_a_failed_step_all_rows_are_set_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a step ran out of memory, the next one kept some rows at the λ of the failed step."""
    groups = groups_of()
    first = step(Dial(0.3), blended=False)
    groups.begin(first)
    make, made = groups._rows, []

    def rows(values: tuple[float, ...], *others: Any) -> Any:
        if made:
            raise torch.OutOfMemoryError
        made.append(values)
        return make(values, *others)

    monkeypatch.setattr(groups, "_rows", rows)
    with pytest.raises(torch.OutOfMemoryError):
        groups.begin(step(Dial(0.5, (("0.mlp", 0.6),)), blended=False))
    monkeypatch.undo()
    groups.begin(first)
    assert [groups.slot(name, logits_only=False).rows.lambdas.item() for name in NAMES] == [
        pytest.approx(0.3)
    ] * len(NAMES)


def test_every_use_of_blended_weights_is_a_hit_or_a_build() -> None:
    groups = groups_of()
    for dial in (Dial(0.3), Dial(0.3), Dial(0.4), Dial(0.3), SPLIT, SPLIT):
        groups.begin(step(dial, blended=True))
        groups.begin(step(dial, blended=True))
        assert groups.cache.hits + groups.cache.builds == groups.executions[B]
        groups.begin(step(dial, Dial(0.9), blended=True))
        assert groups.cache.hits + groups.cache.builds == groups.executions[B]
    assert groups.cache.builds == 2 * len(NAMES) + 1


def test_groups_of_one_λ_share_their_rows() -> None:
    groups = groups_of()
    groups.begin(step(SPLIT, Dial(0.5), blended=False))
    embed, mlp, head = (
        groups.slot(name, logits_only=False).rows for name in ("embed", "0.mlp", "head")
    )
    assert embed is mlp
    assert embed is not head


# --- Derived values and shared products ---------------------------------------------------------


def times_made(count: int) -> int:
    """Returns how often rows of `count` different λ compute a value that is used twice."""
    rows, made = Rows(torch.linspace(0.1, 0.9, count), None), []

    def make(weights: Tensor) -> Tensor:
        made.append(weights)
        return weights * 2

    for _ in range(2):
        assert torch.equal(rows.derived("key", make), rows.lambdas * 2)
    return len(made)


def test_only_steps_of_few_λ_cache_derived_values() -> None:
    assert (times_made(1), times_made(MEMO_ROWS), times_made(MEMO_ROWS + 1)) == (1, 1, 2)


def test_rows_with_a_live_λ_buffer_cache_no_derived_values() -> None:
    weights = torch.tensor([0.25, 0.5])
    rows = Rows(weights, None, live=True)
    assert rows.derived("key", torch.clone).tolist() == [0.25, 0.5]
    weights.fill_(1.0)
    assert rows.derived("key", torch.clone).tolist() == [1.0, 1.0]
    assert rows.mix.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


def test_derived_values_are_cached_by_key() -> None:
    rows = Rows(torch.tensor([0.2, 0.4]), None)
    assert torch.equal(rows.derived("a", lambda weights: weights + 1), rows.lambdas + 1)
    assert torch.equal(rows.derived("b", lambda weights: weights + 2), rows.lambdas + 2)


class CountedMatrix:
    """Multiplies its input by the number of calls."""

    def __init__(self) -> None:
        self.calls = 0

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_shared_product_is_computed_once_for_an_input_and_freed_at_the_end() -> None:
    groups = groups_of()
    groups.begin(step(Dial(0.25), Dial(0.75), blended=False))
    rows, matrix, other = (
        groups.slot("0.attn", logits_only=False).rows,
        CountedMatrix(),
        CountedMatrix(),
    )
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    product = rows.shared(matrix, x, 3)
    assert rows.shared(matrix, x, 3) is product
    assert rows.shared(matrix, y, 3) is not product
    assert (matrix.calls, other.calls) == (2, 0)
    rows.shared(other, y, 3)
    assert (matrix.calls, other.calls) == (2, 1)
    groups.end()
    assert rows._input is None
    assert rows.shared(other, y, 3).tolist() == [[2.0] * 3] * 2


def test_a_shared_product_is_freed_after_its_last_reader() -> None:
    rows, matrix, x = Rows(torch.tensor([0.5]), None), CountedMatrix(), torch.ones(2, 3)
    product = rows.shared(matrix, x, 2)
    assert rows._input is x
    assert rows.shared(matrix, x, 2) is product
    assert rows._input is None
    assert rows._product is rows.lambdas
    assert rows.shared(matrix, x, 2) is not product


# --- Names --------------------------------------------------------------------------------------


def names(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, group) for group, listed in table.items() for name in listed.split()]


@pytest.mark.parametrize(
    ("name", "group"),
    names(
        {
            "embed": "model.embed_tokens.weight model.embed_tokens",
            "head": "model.norm.weight lm_head.weight lm_head model.norm.bias",
            "0.attn": (
                "model.layers.0.self_attn.q_proj.weight model.layers.0.self_attn.k_proj.bias "
                "model.layers.0.self_attn.q_norm.weight "  # qwen3, gemma3
                "model.layers.0.self_attn.qkv_proj.weight "  # phi3
                "model.layers.0.self_attn.sinks "  # gpt_oss
                "model.layers.0.input_layernorm.weight model.layers.0.input_layernorm.bias "
                "layers.0.self_attn"
            ),
            "0.mlp": (
                "model.layers.0.mlp.gate_proj.weight model.layers.0.mlp.c_fc.bias "  # starcoder2
                "model.layers.0.mlp.gate_up_proj.weight "  # phi3
                "model.layers.0.mlp.experts.gate_up_proj model.layers.0.mlp.gate.weight "
                "model.layers.0.mlp.router.weight model.layers.0.mlp.router.bias "  # gpt_oss
                "model.layers.0.mlp.gate.e_score_correction_bias "  # glm4_moe
                "model.layers.0.mlp.shared_expert_gate.weight "  # qwen2_moe
                # The norm after attention: in most families it feeds the MLP, and where it ends
                # the attention block instead (gemma3, olmo2, exaone4) it goes with the MLP too.
                "model.layers.0.post_attention_layernorm.weight "
                "model.layers.0.pre_feedforward_layernorm.weight "  # gemma3
                "model.layers.0.post_feedforward_layernorm.weight"  # gemma3, olmo2
            ),
            "17.attn": "model.layers.17.self_attn.o_proj.weight",
            "17.mlp": "model.layers.17.mlp.down_proj.weight",
        }
    ),
)
def test_a_parameters_name_gives_its_blend_group(name: str, group: str) -> None:
    assert group_of(name) == group
