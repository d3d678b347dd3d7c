"""λ values by blend group, in any form, make one dial, and a dial is written in one form only."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import Dial
from server.routing.group_lambdas import dial_of_groups, dial_to_json
from server.wire.errors import InvalidRequest
from server.wire.reasoning_fields import GroupLambdas

LAYERS = 4
GROUPS = ["embed", "head", *(f"{layer}.{part}" for layer in range(4) for part in ("attn", "mlp"))]
VALUES = st.sampled_from([0.0, 0.3, 0.6, 1.0])


def dial(given: dict[str, Any], step: float = 0.01) -> Dial:
    return dial_of_groups(GroupLambdas.model_validate(given), step=step, layers=LAYERS)


def values(given: dict[str, Any]) -> dict[str, float]:
    setting = dial(given)
    return {name: setting.value_of(name) for name in GROUPS}


def expected(default: float, **named: float) -> dict[str, float]:
    return dict.fromkeys(GROUPS, default) | named


def refusal(given: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        dial(given)
    assert len(caught.value.message) < 300
    return caught.value


def test_groups_that_are_not_named_take_the_default() -> None:
    assert values({"default": 0.6, "head": 0}) == expected(0.6, head=0.0)


def test_attn_sets_the_attention_of_every_layer() -> None:
    attn = {f"{layer}.attn": 0.8 for layer in range(LAYERS)}
    assert values({"default": 0.6, "attn": 0.8}) == expected(0.6, **attn)


def test_a_range_of_layers_includes_both_ends_and_overrides_attn_and_mlp() -> None:
    given = {"default": 0.6, "attn": 0.8, "layers": {"1-2": 0, "3": {"mlp": 1}}}
    assert values(given) == expected(
        0.6,
        **{"0.attn": 0.8, "1.attn": 0.0, "1.mlp": 0.0, "2.attn": 0.0, "2.mlp": 0.0},
        **{"3.attn": 0.8, "3.mlp": 1.0},
    )


def test_a_dial_with_one_λ_everywhere_is_the_plain_dial() -> None:
    same = {"default": 0.6, "attn": 0.6, "mlp": 0.6, "head": 0.601, "layers": {"0-3": 0.6}}
    assert dial(same) == Dial(0.6)
    assert dial_to_json(dial(same), LAYERS) == 0.6


def test_if_every_group_is_named_the_most_common_lambda_is_the_default() -> None:
    assert dial({"attn": 0.8, "mlp": 0.8, "embed": 0, "head": 0}).reasoning_lambda == 0.8
    assert dial({"attn": 0.8, "mlp": 0.2, "embed": 0.2, "head": 0.8}).reasoning_lambda == 0.2


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attn": 0.8, "mlp": 0.6, "embed": 0.5},
        {"layers": {"0-3": 0.5}},
        {"embed": 1, "head": 1, "layers": {"0-2": 0.5, "3": {"attn": 1}}},
    ],
)
def test_groups_that_are_not_named_need_a_default(given: dict[str, Any]) -> None:
    error = refusal(given)
    assert error.param == "reasoning_lambda.default"
    assert "default" in error.message


@pytest.mark.parametrize(
    ("layers", "key"),
    [
        ({"0-4": 0.5}, "0-4"),
        ({"4": 0.5}, "4"),
        ({"2-1": 0.5}, "2-1"),
        ({"": 0.5}, ""),
        ({"-1": 0.5}, "-1"),
        ({"0-": 0.5}, "0-"),
        ({"0 - 1": 0.5}, "0 - 1"),
        ({"1,2": 0.5}, "1,2"),
        ({"٣": 0.5}, "٣"),
        ({"9" * 5000: 0.5}, "9" * 39 + "…"),
        ({"0-1": 0.5, "1-2": 0.5}, "1-2"),
        ({"1": {"attn": 0.5}, "0-3": {"mlp": 0.5}}, "0-3"),
        ({"1": {}}, "1"),
        ({"0-1": 1.5}, "0-1"),
        ({"0-1": {"attn": 0.5, "mlp": -0.1}}, "0-1.mlp"),
    ],
)
def test_a_bad_range_names_its_key(layers: dict[str, Any], key: str) -> None:
    assert refusal({"default": 0.6, "layers": layers}).param == f"reasoning_lambda.layers.{key}"


@pytest.mark.parametrize("name", ["default", "attn", "mlp", "embed", "head"])
def test_a_lambda_out_of_range_names_its_group(name: str) -> None:
    assert refusal({"default": 0.6, name: 1.01}).param == f"reasoning_lambda.{name}"


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ({"default": 0.6}, 0.6),
        ({"default": 0.6, "mlp": 0.8}, {"default": 0.6, "mlp": 0.8}),
        ({"default": 0.6, "layers": {"0-3": {"attn": 0}}}, {"default": 0.6, "attn": 0.0}),
        ({"default": 0.6, "layers": {"0": 1, "1": 1}}, {"default": 0.6, "layers": {"0-1": 1.0}}),
        (
            {"default": 0.6, "attn": 1, "layers": {"2": {"mlp": 1}}},
            {"default": 0.6, "attn": 1.0, "layers": {"2": {"mlp": 1.0}}},
        ),
        (
            {"default": 0.6, "attn": 1, "layers": {"2": 0.2, "3": {"attn": 0.6}}},
            {"default": 0.6, "attn": 1.0, "layers": {"2": 0.2, "3": {"attn": 0.6}}},
        ),
        (
            {"default": 0.6, "layers": {"0": {"mlp": 1}, "1-3": {"mlp": 0}}},
            {"default": 0.6, "mlp": 0.0, "layers": {"0": {"mlp": 1.0}}},
        ),
        ({"default": 0.6, "head": 0, "embed": 0}, {"default": 0.6, "embed": 0.0, "head": 0.0}),
    ],
)
def test_a_dial_is_written_in_its_shortest_form(given: dict[str, Any], canonical: Any) -> None:
    assert dial_to_json(dial(given), LAYERS) == canonical


@given(VALUES, st.dictionaries(st.sampled_from(GROUPS), VALUES))
def test_any_dial_round_trips_through_its_written_form(
    default: float, named: dict[str, float]
) -> None:
    setting = Dial.on_grid(default, 0.1, named)
    written = dial_to_json(setting, LAYERS)
    if isinstance(written, dict):
        assert dial(written, step=0.1) == setting
    else:
        assert setting == Dial(written)
