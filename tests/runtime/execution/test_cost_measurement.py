"""What is measured at start: where kernels are taken, and what is timed for the planner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mi_runtime.errors import PairError
from mi_runtime.execution import cost_measurement
from mi_runtime.execution.cost_measurement import (
    best_row_limit,
    choose_kernels,
    measure_kernels,
    with_replays,
)
from mi_runtime.execution.decode_graphs import GraphKey
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import Way
from mi_runtime.scheduling.planner import CostCurve, CostModel
from tests.runtime.conftest import MakeEngine, PairOf
from tests.runtime.execution.test_decode_graphs import record
from tests.runtime.shared_models import shared_model

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
    assert best_row_limit(ROWS, kernel, vendor) == limit


def model_of(pair: tuple[Path, Path]) -> BlendedModel:
    return shared_model(pair)


def test_without_a_gpu_no_kernels_are_taken_and_nothing_is_told(
    qwen3_pair: tuple[Path, Path],
) -> None:
    model = model_of(qwen3_pair)
    assert choose_kernels(model) == ""
    assert (model.kernels.rows, model.kernels.experts) == (0, False)


def failing(pair: tuple[Path, Path], patch: pytest.MonkeyPatch, error: Exception) -> BlendedModel:
    """A model that believes itself on a GPU, whose kernels raise."""

    def fail(model: BlendedModel) -> None:
        model.kernels.rows = 8
        raise error

    patch.setattr(cost_measurement, "measure_kernels", fail)
    patch.setattr(cost_measurement, "triton_installed", lambda: True)
    patch.setattr(cost_measurement, "is_lost", lambda device: "illegal" in str(error))
    return replace(model_of(pair), device=torch.device("cuda"))


def test_kernels_that_do_not_run_are_off_and_the_reason_is_told(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = failing(qwen3_pair, monkeypatch, RuntimeError("no kernel image"))
    assert choose_kernels(model) == "none, as they do not run here (no kernel image)"
    assert model.kernels.rows == 0


def test_kernels_that_take_the_gpu_with_them_end_the_start(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured next raised an error that named neither."""
    with pytest.raises(PairError, match=r"pair kernels do not run \(an illegal access\)"):
        choose_kernels(failing(qwen3_pair, monkeypatch, RuntimeError("an illegal access")))


def test_a_gpu_that_is_full_is_no_fault_of_the_kernels(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choose_kernels(failing(qwen3_pair, monkeypatch, full))


def test_kernels_that_are_slower_take_no_dense_products_but_the_experts(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted they are slower by far."""
    monkeypatch.setattr(cost_measurement, "KERNEL_ROWS", (1, 2))
    monkeypatch.setattr(cost_measurement, "REPEATS", 1)
    model = model_of(pair_of("qwen3", num_hidden_layers=1))
    measure_kernels(model)
    assert (model.kernels.rows, model.kernels.experts) == (0, True)


def test_a_replay_is_timed_where_decodes_are_recorded(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fixed cost is what the products of as many rows do not explain."""
    engine = make_engine()
    graphs, model = record(engine), engine._runner._model
    key, _ = graphs.smallest
    assert key == GraphKey(min(one.rows for one in graphs.keys), Way.ENDPOINT)
    single, pair = CostCurve((1, 3), (2.0, 4.0)), CostCurve((1, 3), (7.0, 9.0))
    costs = CostModel(20.0, 20.0, single, pair, build=1.0)
    timed: list[torch.Tensor] = []

    def ten_seconds(_model: BlendedModel, work: Callable[[], torch.Tensor]) -> float:
        timed.append(work())
        return 10.0

    monkeypatch.setattr(cost_measurement, "_time", ten_seconds)
    assert with_replays(costs, model, graphs) == replace(costs, replayed=7.0)
    assert timed[0].shape == (key.rows, model.vocab_size)


def test_a_gpu_is_timed_on_more_weights_than_its_cache_holds(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(qwen3_pair)
    on_gpu = replace(model, device=torch.device("cuda"))
    (middle, *_) = cost_measurement._sampled_matrices(model)
    layer = len(cost_measurement._sampled_matrices(model))
    of_layer = sum(one.instruct.nbytes for one in cost_measurement._sampled_matrices(model))
    for cold, layers in ((1, 1), (of_layer + 1, 2), (10**9, len(model.layers) // 2 + 1)):
        monkeypatch.setattr(cost_measurement, "COLD_BYTES", cold)
        sample = cost_measurement._sampled_matrices(on_gpu)
        assert (len(sample), sample[0]) == (layers * layer, middle)
        assert len(set(sample)) == len(sample)
