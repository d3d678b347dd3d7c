"""At start, kernels are measured against plain products, and forwards are timed for the planner."""

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
from tests.runtime.execution.test_decode_graphs import capture
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
def test_the_row_limit_of_kernels_is_where_they_save_most(
    kernel: tuple[float, ...], vendor: tuple[float, ...], limit: int
) -> None:
    assert best_row_limit(ROWS, kernel, vendor) == limit


def test_without_a_gpu_no_kernels_are_used_and_nothing_is_reported(
    qwen3_pair: tuple[Path, Path],
) -> None:
    model = shared_model(qwen3_pair)
    assert choose_kernels(model) == ""
    assert (model.kernels.rows, model.kernels.experts) == (0, False)


def model_with_failing_kernels(
    pair: tuple[Path, Path], patch: pytest.MonkeyPatch, error: Exception
) -> BlendedModel:
    """Returns a model with a CUDA device, whose kernels raise this error."""

    def fail(model: BlendedModel) -> None:
        model.kernels.rows = 8
        raise error

    patch.setattr(cost_measurement, "measure_kernels", fail)
    patch.setattr(cost_measurement, "triton_installed", lambda: True)
    patch.setattr(cost_measurement, "is_lost", lambda device: "illegal" in str(error))
    return replace(shared_model(pair), device=torch.device("cuda"))


def test_kernels_that_do_not_run_are_off_and_the_reason_is_reported(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with_failing_kernels(qwen3_pair, monkeypatch, RuntimeError("no kernel image"))
    assert choose_kernels(model) == "off: they failed (no kernel image)"
    assert model.kernels.rows == 0


def test_kernels_that_break_the_gpu_end_the_start(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next measurement raised an error that named neither GPU nor kernels."""
    with pytest.raises(PairError, match=r"pair kernels failed \(an illegal access\)"):
        choose_kernels(
            model_with_failing_kernels(qwen3_pair, monkeypatch, RuntimeError("an illegal access"))
        )


def test_running_out_of_memory_does_not_disable_the_kernels(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choose_kernels(model_with_failing_kernels(qwen3_pair, monkeypatch, full))


def test_slower_kernels_are_used_for_experts_only(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted kernels are much slower."""
    monkeypatch.setattr(cost_measurement, "KERNEL_ROWS", (1, 2))
    monkeypatch.setattr(cost_measurement, "REPEATS", 1)
    model = shared_model(pair_of("qwen3", num_hidden_layers=1))
    measure_kernels(model)
    assert (model.kernels.rows, model.kernels.experts) == (0, True)


def test_a_replay_is_timed_if_decodes_are_captured(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fixed cost is its time less that of the products of as many rows."""
    engine = make_engine()
    graphs, model = capture(engine), engine._runner._model
    key, _ = graphs.smallest
    assert key == GraphKey(min(one.rows for one in graphs.keys), Way.ENDPOINT)
    blended, pair = CostCurve((1, 3), (2.0, 4.0)), CostCurve((1, 3), (7.0, 9.0))
    costs = CostModel(20.0, 20.0, blended, pair, build=1.0)
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
    model = shared_model(qwen3_pair)
    on_gpu = replace(model, device=torch.device("cuda"))
    (middle, *_) = cost_measurement._sampled_matrices(model)
    layer = len(cost_measurement._sampled_matrices(model))
    of_layer = sum(one.instruct.nbytes for one in cost_measurement._sampled_matrices(model))
    for cold, layers in ((1, 1), (of_layer + 1, 2), (10**9, len(model.layers) // 2 + 1)):
        monkeypatch.setattr(cost_measurement, "COLD_BYTES", cold)
        sample = cost_measurement._sampled_matrices(on_gpu)
        assert (len(sample), sample[0]) == (layers * layer, middle)
        assert len(set(sample)) == len(sample)
