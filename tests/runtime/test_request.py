"""The engine's values: λ on its grid, and which tokens end an answer."""

import math

import pytest

from mi_runtime.config import EngineConfig
from mi_runtime.request import Dial, SamplingParams


@pytest.mark.parametrize(
    ("value", "step", "expected"),
    [
        (0.0, 0.01, 0.0),
        (1.0, 0.01, 1.0),
        (0.3, 0.01, 0.3),
        (0.304, 0.01, 0.3),
        (0.306, 0.01, 0.31),
        (0.001, 0.01, 0.0),
        (0.999, 0.01, 1.0),
        (0.55, 0.5, 0.5),
        (0.3, 1.0, 0.0),
        (1, 0.25, 1.0),
    ],
)
def test_a_dial_is_rounded_to_the_grid(value: float, step: float, expected: float) -> None:
    assert Dial.on_grid(value, step) == Dial(expected)


def test_every_point_of_the_grid_stays_where_it_is() -> None:
    points = [index / 100 for index in range(101)]
    assert [Dial.on_grid(point, 0.01).reasoning_lambda for point in points] == points


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_dial_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"λ must be a number in \[0, 1\]"):
        Dial.on_grid(value, 0.01)


@pytest.mark.parametrize("step", [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0])
def test_a_grid_that_divides_1_is_taken(step: float) -> None:
    assert EngineConfig("a", "b", lambda_step=step).lambda_step == step


@pytest.mark.parametrize("step", [0.0, -0.1, 0.03, 0.7, 2.0, math.nan])
def test_a_grid_that_does_not_divide_1_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="lambda_step must divide 1 evenly"):
        EngineConfig("a", "b", lambda_step=step)


def test_stop_tokens_end_an_answer_beside_the_ends_of_the_model() -> None:
    params = SamplingParams(stop_token_ids=frozenset({1}), eos_token_ids=frozenset({2}))
    assert params.ending_token_ids == {1, 2}


def test_ignored_ends_leave_the_stop_tokens() -> None:
    ends = {"stop_token_ids": frozenset({1}), "eos_token_ids": frozenset({2})}
    assert SamplingParams(ignore_eos=True, **ends).ending_token_ids == {1}
