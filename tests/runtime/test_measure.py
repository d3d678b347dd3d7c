"""What is measured at start: where kernels are taken."""

from pathlib import Path

import pytest

from mi_runtime import measure
from mi_runtime.load import BlendedModel, load_pair
from mi_runtime.measure import choose_kernels, measure_kernels, rows_worth
from mi_runtime.pair import check_pair

ROWS = (1, 8, 64)


@pytest.mark.parametrize(
    ("kernel", "vendor", "limit"),
    [
        ((1, 1, 1), (2, 2, 2), 64),
        ((2, 2, 2), (1, 1, 1), 0),
        ((1, 1, 9), (2, 2, 2), 8),
        ((1.1, 0.5, 9), (1, 1, 1), 8),  # a little is lost at one row, much gained at eight
        ((9, 0.9, 9), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 1), 0),
    ],
)
def test_the_limit_of_kernels_is_where_they_save_most(
    kernel: tuple[float, ...], vendor: tuple[float, ...], limit: int
) -> None:
    assert rows_worth(ROWS, kernel, vendor) == limit


def model_of(pair: tuple[Path, Path]) -> BlendedModel:
    return load_pair(check_pair(*pair), "cpu")


def test_without_a_gpu_no_kernels_are_taken_and_nothing_is_told(
    qwen3_pair: tuple[Path, Path],
) -> None:
    model = model_of(qwen3_pair)
    assert choose_kernels(model) == ""
    assert (model.kernels.rows, model.kernels.experts) == (0, False)


def test_kernels_that_are_slower_take_no_dense_products_but_the_experts(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted they are slower by far."""
    monkeypatch.setattr(measure, "KERNEL_ROWS", (1, 2))
    monkeypatch.setattr(measure, "REPEATS", 1)
    model = model_of(qwen3_pair)
    measure_kernels(model)
    assert (model.kernels.rows, model.kernels.experts) == (0, True)
