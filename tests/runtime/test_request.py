"""λ is rounded to its grid, and a request knows which tokens end its answer."""

import math

import pytest

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


def test_a_point_of_the_grid_is_not_changed() -> None:
    points = [index / 100 for index in range(101)]
    assert [Dial.on_grid(point, 0.01).reasoning_lambda for point in points] == points


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_dial_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"λ must be a number in \[0, 1\]"):
        Dial.on_grid(value, 0.01)


def test_stop_tokens_and_the_models_end_tokens_end_an_answer() -> None:
    params = SamplingParams(stop_token_ids=frozenset({1}), eos_token_ids=frozenset({2}))
    assert params.ending_token_ids == {1, 2}


def test_with_ignore_eos_only_stop_tokens_end_an_answer() -> None:
    ends = {"stop_token_ids": frozenset({1}), "eos_token_ids": frozenset({2})}
    assert SamplingParams(ignore_eos=True, **ends).ending_token_ids == {1}
