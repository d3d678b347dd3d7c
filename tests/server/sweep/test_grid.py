"""Settings, groups and the order of samples cover the grid that a command names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import Dial
from server.routing.group_lambdas import dial_of_groups
from server.sweep.errors import BadParameters
from server.sweep.grid import (
    Decoding,
    Setting,
    ablation_groups,
    curves_of,
    lambda_field,
    planned_samples,
    settings_of,
)
from server.sweep.tasks import embedded_task
from server.wire.reasoning_fields import GroupLambdas

QUESTIONS = embedded_task(4, 0).questions


def dial_of(name: str, value: float, layers: int) -> Dial:
    wire = lambda_field(name, value, layers)
    assert isinstance(wire, dict)
    return dial_of_groups(GroupLambdas.model_validate(wire), step=0.01, layers=layers)


def groups_at(name: str, value: float, layers: int = 6) -> set[str]:
    dial = dial_of(name, value, layers)
    names = ["embed", "head", *(f"{n}.{part}" for n in range(layers) for part in ("attn", "mlp"))]
    assert {dial.value_of(group) for group in names} <= {0.0, value}
    return {group for group in names if dial.value_of(group) == value}


def test_the_group_all_is_a_single_lambda() -> None:
    assert lambda_field("all", 0.8, 6) == 0.8


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("mlp", {f"{n}.mlp" for n in range(6)}),
        ("attn", {f"{n}.attn" for n in range(6)}),
        ("0-1", {"0.attn", "0.mlp", "1.attn", "1.mlp"}),
        ("2-3.mlp", {"2.mlp", "3.mlp"}),
        ("5-5", {"5.attn", "5.mlp"}),
        ("0-5", {f"{n}.{part}" for n in range(6) for part in ("attn", "mlp")}),
    ],
)
def test_the_chosen_groups_get_lambda_and_the_others_zero(name: str, groups: set[str]) -> None:
    assert groups_at(name, 0.8) == groups


def test_the_default_of_chosen_groups_is_its_lambda() -> None:
    assert dial_of("mlp", 0.8, 6).reasoning_lambda == 0.8


@pytest.mark.parametrize("name", ["", "ffn", "3", "2-1", "0-6", "mlp.0-1", "0-1mlp", "0-1."])
def test_an_unknown_group_is_refused(name: str) -> None:
    with pytest.raises(BadParameters, match="--dials"):
        lambda_field(name, 0.5, 6)


def test_the_ablation_is_the_papers_table() -> None:
    assert ablation_groups(36) == ["all", "mlp", "attn", "0-23", "12-35", "0-11", "12-23", "24-35"]
    assert ablation_groups(6) == ["all", "mlp", "attn", "0-3", "2-5", "0-1", "2-3", "4-5"]


@given(st.integers(3, 200))
def test_every_group_of_an_ablation_exists_in_its_model(layers: int) -> None:
    for name in ablation_groups(layers):
        lambda_field(name, 0.5, layers)


def test_a_curve_for_each_choice_of_groups_and_decoding() -> None:
    curves = curves_of([1, 0, 0.5], ["all", "mlp"], [0.6, 0.7], [0.8, 0.95], 20)
    assert len(curves) == 8
    assert all([it.reasoning_lambda for it in curve] == [0, 0.5, 1] for curve in curves)
    assert len({setting.label for setting in settings_of(curves)}) == 24


def test_lambda_zero_may_have_a_decoding_of_its_own_on_every_curve() -> None:
    instruct = Decoding(0.7, 0.8, 20)
    curves = curves_of([0, 1], ["all"], [0.6, 1.0], [0.95], 20, instruct)
    assert [curve[0].decoding for curve in curves] == [instruct, instruct]
    assert len(settings_of(curves)) == 3  # λ = 0 is measured once


def test_samples_are_planned_once_each_with_all_lambdas_in_turn() -> None:
    curve = [Setting(value / 10, "all", Decoding(0.7, 1.0)) for value in range(11)]
    units = list(planned_samples([(it, range(3)) for it in curve], QUESTIONS))
    assert len({unit.key for unit in units}) == len(units) == 11 * 3 * 4
    for at in range(0, len(units), 11):
        assert len({unit.setting for unit in units[at : at + 11]}) == 11


def test_a_later_round_plans_only_the_new_samples() -> None:
    curve = [Setting(value, "all", Decoding(0.7, 1.0)) for value in (0, 1)]
    units = list(planned_samples([(curve[0], range(2)), (curve[1], range(2, 5))], QUESTIONS[:1]))
    order = [(unit.setting.reasoning_lambda, unit.sample) for unit in units]
    assert order == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]


def test_seeds_differ_by_question_lambda_and_sample_alone() -> None:
    curves = curves_of([0, 0.5, 1], ["all", "mlp"], [0.6, 0.7], [1.0])
    units = list(planned_samples([(it, range(3)) for it in settings_of(curves)], QUESTIONS))
    seeds = {unit.seed(0) for unit in units}
    assert len(seeds) == 3 * 3 * len(QUESTIONS)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert units[0].seed(0) != units[0].seed(1)
