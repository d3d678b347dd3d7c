"""The engine's settings accept only a grid of λ that divides 1 evenly."""

import math

import pytest

from mi_runtime.config import EngineConfig


@pytest.mark.parametrize("step", [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0])
def test_a_grid_that_divides_1_is_accepted(step: float) -> None:
    assert EngineConfig("a", "b", lambda_step=step).lambda_step == step


@pytest.mark.parametrize("step", [0.0, -0.1, 0.03, 0.7, 2.0, math.nan])
def test_a_grid_that_does_not_divide_1_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="lambda_step must divide 1 evenly"):
        EngineConfig("a", "b", lambda_step=step)
