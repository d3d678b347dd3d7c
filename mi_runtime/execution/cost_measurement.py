"""Measures at start-up what a forward pass costs on this device at the model's shapes.

It times the products of one decoder layer's linear modules for a few row counts, with an
endpoint's weights (blended weights cost the same) and as pair product, and one blend of them, and
scales the times to the whole model by parameter count. On a GPU it samples several layers if one
would stay in the GPU's cache, and captures the products as a CUDA graph, so that launches by the
host do not count: they are in `CostModel.fixed`, the remainder of an eager forward pass. Once CUDA
graphs are captured, a replay is timed too. Before all this, on a GPU, it measures up to how many
rows the pair kernels of `mi_runtime.kernels` are faster than cuBLAS. It takes well under a second
on the embedded pair, and a few seconds on large pairs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from mi_runtime.attention.reference import PackedAttention
from mi_runtime.errors import PairError
from mi_runtime.execution.decode_graphs import DecodeGraphs
from mi_runtime.kernels.triton_support import cause_of, is_lost, launch_errors, triton_installed
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.pair_modules import PairLinear, weights_of
from mi_runtime.model.row_lambdas import INSTRUCT, Rows, StepRows, Way
from mi_runtime.model.weights import Matrix
from mi_runtime.request import Dial
from mi_runtime.scheduling.planner import CostCurve, CostModel

ROWS = (1, 8, 32, 128, 512)
KERNEL_ROWS = (1, 4, 16, 32, 64, 128, 256)  # with more rows, products are compute-bound
REPEATS = 5
RUNS_OF_GPU = 10  # timed together, so that one launch and one wait cost little
COLD_BYTES = 2**27  # of weights: too many to stay in a GPU's cache from run to run


@torch.inference_mode()
def measure_costs(model: BlendedModel) -> CostModel:
    """Returns the cost model. Times are the least of a few repeats, as noise only adds time."""
    sample = _sampled_matrices(model)
    sampled = sum(matrix.parameters for matrix in sample)
    endpoint: list[float] = []
    pair: list[float] = []
    for rows in ROWS:
        scale = _parameters_read(model, rows) / sampled
        inputs = [_random(model, rows, matrix.instruct.shape[1]) for matrix in sample]
        half = torch.full((rows,), 0.5, device=model.device)
        ways = Rows(half, INSTRUCT), Rows(half, None)
        for way, seconds in zip(ways, (endpoint, pair), strict=True):
            products = _captured(model, lambda: _products(sample, inputs, way))  # noqa: B023
            seconds.append(scale * _time(model, products))
    build = _parameters(model) / sampled * _time(model, lambda: [one.blend(0.5) for one in sample])
    forward = _time(model, lambda: _forward_one_row(model, Dial(0.0)))
    fixed = max(0.0, forward - endpoint[0])
    return CostModel(
        fixed=fixed,
        replayed=fixed,
        blended=CostCurve(ROWS, tuple(accumulate(endpoint, max))),  # more rows must not cost less
        pair=CostCurve(ROWS, tuple(accumulate(pair, max))),
        build=build,
    )


@torch.inference_mode()
def with_replays(costs: CostModel, model: BlendedModel, graphs: DecodeGraphs) -> CostModel:
    """Returns these costs with the cost of a replay, timed with the smallest graph."""
    key, replay = graphs.smallest
    way = costs.blended if key.way is Way.ENDPOINT else costs.pair
    return replace(costs, replayed=max(0.0, _time(model, replay) - way.at(key.rows)))


def choose_kernels(model: BlendedModel) -> str:
    """Enables the model's pair kernels where they are faster, on a GPU; returns a description.

    Raises PairError if a failing kernel makes the device unusable.

    Only dense products are measured. Expert kernels are always enabled: without them the host must
    wait to see which experts were chosen, and no graph can capture that.
    """
    if model.device.type != "cuda" or not triton_installed() or not _sampled_matrices(model):
        return ""
    try:
        measure_kernels(model)
    except torch.OutOfMemoryError:
        raise
    except launch_errors() as error:
        if is_lost(model.device):
            lost = "and this process can no longer use the GPU"
            raise PairError([f"pair kernels failed ({cause_of(error)}), {lost}"]) from error
        model.kernels.enable(rows=0, experts=False)
        return f"off: they failed ({cause_of(error)})"
    return f"up to {model.kernels.rows} rows"


@torch.inference_mode()
def measure_kernels(model: BlendedModel) -> None:
    """Enables the kernels up to the number of rows that saves most, by the middle layer."""
    model.kernels.enable(max(KERNEL_ROWS))
    _forward_one_row(model, Dial(0.5))  # fails here if expert kernels do not run
    seconds = []
    for limit in (max(KERNEL_ROWS), 0):
        model.kernels.enable(limit)
        seconds.append([_pair_seconds(model, rows) for rows in KERNEL_ROWS])
    model.kernels.enable(best_row_limit(KERNEL_ROWS, *seconds))


def best_row_limit(rows: Sequence[int], kernel: Sequence[float], vendor: Sequence[float]) -> int:
    """Returns the row limit up to which kernels save most, weighing all row counts equally.

    `kernel` and `vendor` are seconds for each number of `rows`.
    """
    gains = [1 - ours / theirs for ours, theirs in zip(kernel, vendor, strict=True)]
    totals = (0.0, *accumulate(gains))
    return (0, *rows)[totals.index(max(totals))]


def _pair_seconds(model: BlendedModel, rows: int) -> float:
    """Returns the seconds of the sampled pair products for this many rows."""
    sample = _sampled_matrices(model)
    inputs = [_random(model, rows, matrix.instruct.shape[1]) for matrix in sample]
    mixed = Rows(torch.full((rows,), 0.5, device=model.device), None)
    return _time(model, _captured(model, lambda: _products(sample, inputs, mixed)))


def _captured(model: BlendedModel, work: Callable[[], None]) -> Callable[[], None]:
    """Captures `work` as a CUDA graph on a GPU, so that launches by the host are not timed."""
    if model.device.type != "cuda":
        return work
    work()  # kernels must be compiled before the capture
    graph = torch.cuda.CUDAGraph()
    # A capture that fails may leave its stream current; the outer context restores ours.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        work()
    return graph.replay


def _parameters_read(model: BlendedModel, rows: int) -> float:
    """Returns how many parameters this many rows read: they use only some of the experts."""
    parameters = 0.0
    top_k = int(getattr(model.model.config, "num_experts_per_tok", None) or 1)
    for weights in weights_of(model.model):
        experts = len(weights.instruct) if weights.instruct.dim() == 3 else 1
        parameters += weights.parameters * min(1.0, rows * top_k / experts)
    return parameters


def blend_bytes(model: BlendedModel) -> int:
    """Returns the bytes of all blended weights of one λ."""
    return _parameters(model) // 2 * model.dtype.itemsize


def _parameters(model: BlendedModel) -> int:
    """Returns the number of parameters, of both endpoints, that a blend reads."""
    return sum(weights.parameters for weights in weights_of(model.model))


def _sampled_matrices(model: BlendedModel) -> list[Matrix]:
    """Returns the linear matrices of the middle layer.

    On a GPU, the following layers are added until one endpoint has `COLD_BYTES`, since fewer
    matrices would be read from the GPU's cache.
    """
    layers = len(model.layers)
    sample: list[Matrix] = []
    for layer in range(layers // 2, layers):
        sample += _layer_matrices(model, layer)
        held = sum(matrix.instruct.nbytes for matrix in sample)
        if model.device.type != "cuda" or held >= COLD_BYTES:
            break
    return sample


def _layer_matrices(model: BlendedModel, layer: int) -> list[Matrix]:
    """Returns the matrices of a layer's linear modules, each once."""
    linear = (
        module.pair
        for name, module in model.model.named_modules()
        if f"layers.{layer}." in name and isinstance(module, PairLinear)
    )
    return list(dict.fromkeys(linear))  # modules may share one


def _products(matrices: list[Matrix], inputs: list[torch.Tensor], rows: Rows) -> None:
    for matrix, x in zip(matrices, inputs, strict=True):
        matrix.product(x, rows)
    rows.forget_input()


def _forward_one_row(model: BlendedModel, dial: Dial) -> None:
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    model.groups.begin(StepRows((dial,), (0,), (0,), blended=False))
    model.logits(zero, zero, zero, PackedAttention((1,)))


def _random(model: BlendedModel, rows: int, width: int) -> torch.Tensor:
    """Returns random inputs. A failed capture leaves torch's default generator unusable."""
    generator = torch.Generator(model.device).manual_seed(0)
    return torch.randn(rows, width, device=model.device, generator=generator).to(model.dtype)


def _time(model: BlendedModel, work: Callable[[], object]) -> float:
    """Returns the seconds of one run of `work`, the least of a few repeats."""
    work()
    runs = RUNS_OF_GPU if model.device.type == "cuda" else 1
    seconds = []
    for _ in range(REPEATS):
        _wait(model)
        started = time.perf_counter()
        for _ in range(runs):
            work()
        _wait(model)
        seconds.append((time.perf_counter() - started) / runs)
    return min(seconds)


def _wait(model: BlendedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
