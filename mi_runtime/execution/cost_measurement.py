"""What a forward costs on this device at a model's own shapes, measured at start-up.

Times the products of a decoder layer's linear modules, for a few row counts, once with single
weights and once as pair product, and one blend of them; scaled to the whole model by parameters.
On a GPU these are of several layers where one would stay in its cache, and captured as a graph:
what the host takes to launch them is in `CostModel.fixed`, the rest of an eager forward. Once
decode steps are recorded, a replay is timed. Before all that, on a GPU, which of those products are
faster as kernels of `mi_runtime.kernels`. Takes well under a second on the embedded pair, a few
seconds on large ones.
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
from mi_runtime.scheduling.planner import CostModel, Curve

ROWS = (1, 8, 32, 128, 512)
KERNEL_ROWS = (1, 4, 16, 32, 64, 128, 256)  # beyond, products are bound by arithmetic
REPEATS = 5
RUNS_OF_GPU = 10  # timed together: the launch of one and the wait for it are not what it takes
COLD_BYTES = 2**27  # of weights, that a GPU does not find in its cache when it reads them again


@torch.inference_mode()
def measure_costs(model: BlendedModel) -> CostModel:
    """Seconds: the least of a few repeats, as other work on the machine only adds to it."""
    sample = _sampled_matrices(model)
    sampled = sum(matrix.parameters for matrix in sample)
    single: list[float] = []
    pair: list[float] = []
    for rows in ROWS:
        scale = _parameters_read(model, rows) / sampled
        inputs = [_random(model, rows, matrix.instruct.shape[1]) for matrix in sample]
        half = torch.full((rows,), 0.5, device=model.device)
        ways = Rows(half, INSTRUCT), Rows(half, None)
        for way, seconds in zip(ways, (single, pair), strict=True):
            products = _captured(model, lambda: _products(sample, inputs, way))  # noqa: B023
            seconds.append(scale * _time(model, products))
    whole = _parameters(model) / sampled
    build = whole * _time(model, lambda: [one.blend(0.5) for one in sample])
    forward = _time(model, lambda: _forward_one_row(model, Dial(0.0)))
    fixed = max(0.0, forward - single[0])
    return CostModel(
        fixed=fixed,
        replayed=fixed,
        single=Curve(ROWS, tuple(accumulate(single, max))),  # more rows never cost less
        pair=Curve(ROWS, tuple(accumulate(pair, max))),
        build=build,
    )


@torch.inference_mode()
def with_replays(costs: CostModel, model: BlendedModel, graphs: DecodeGraphs) -> CostModel:
    """These costs where decode steps are replayed: the smallest recording is timed."""
    key, replay = graphs.smallest
    way = costs.single if key.way is Way.ENDPOINT else costs.pair
    return replace(costs, replayed=max(0.0, _time(model, replay) - way.at(key.rows)))


def choose_kernels(model: BlendedModel) -> str:
    """Enables the model's kernels where they are worth it, on a GPU; gives what to tell of it.

    Raises PairError where kernels that do not run take the device with them.

    Only dense products are measured: of experts, the kernels' rival is a look from the host, which
    no graph can capture.
    """
    if model.device.type != "cuda" or not triton_installed() or not _sampled_matrices(model):
        return ""
    try:
        measure_kernels(model)
    except torch.OutOfMemoryError:
        raise
    except launch_errors() as error:
        if is_lost(model.device):
            lost = "and the GPU takes no more work of this process"
            raise PairError([f"pair kernels do not run ({cause_of(error)}), {lost}"]) from error
        model.kernels.enable(rows=0, experts=False)
        return f"none, as they do not run here ({cause_of(error)})"
    return f"up to {model.kernels.rows} rows"


@torch.inference_mode()
def measure_kernels(model: BlendedModel) -> None:
    """Enables them up to the number of rows that saves most, at the middle layer's shapes."""
    model.kernels.enable(max(KERNEL_ROWS))
    _forward_one_row(model, Dial(0.5))  # experts too
    seconds = []
    for limit in (max(KERNEL_ROWS), 0):
        model.kernels.enable(limit)
        seconds.append([_pair_seconds(model, rows) for rows in KERNEL_ROWS])
    model.kernels.enable(best_row_limit(KERNEL_ROWS, *seconds))


def best_row_limit(rows: Sequence[int], kernel: Sequence[float], vendor: Sequence[float]) -> int:
    """The limit up to which kernels save most, counting each measured number of rows alike."""
    gains = [1 - own / other for own, other in zip(kernel, vendor, strict=True)]
    totals = (0.0, *accumulate(gains))
    return (0, *rows)[totals.index(max(totals))]


def _pair_seconds(model: BlendedModel, rows: int) -> float:
    sample = _sampled_matrices(model)
    inputs = [_random(model, rows, matrix.instruct.shape[1]) for matrix in sample]
    mixed = Rows(torch.full((rows,), 0.5, device=model.device), None)
    return _time(model, _captured(model, lambda: _products(sample, inputs, mixed)))


def _captured(model: BlendedModel, work: Callable[[], None]) -> Callable[[], None]:
    """On a GPU as a graph, as decoding runs it: what the host takes to launch it is not timed."""
    if model.device.type != "cuda":
        return work
    work()  # what compiles, compiles now
    graph = torch.cuda.CUDAGraph()
    # A recording that fails may leave its stream the current one: the outer one gives back ours.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        work()
    return graph.replay


def _parameters_read(model: BlendedModel, rows: int) -> float:
    """Of both endpoints, those that this many rows use: they hit only some of the experts."""
    parameters = 0.0
    top_k = int(getattr(model.model.config, "num_experts_per_tok", None) or 1)
    for weights in weights_of(model.model):
        experts = len(weights.instruct) if weights.instruct.dim() == 3 else 1
        parameters += weights.parameters * min(1.0, rows * top_k / experts)
    return parameters


def blend_bytes(model: BlendedModel) -> int:
    """Bytes of all blended weights of one λ."""
    return _parameters(model) // 2 * model.dtype.itemsize


def _parameters(model: BlendedModel) -> int:
    """Of both endpoints, in everything that a blend materializes."""
    return sum(weights.parameters for weights in weights_of(model.model))


def _sampled_matrices(model: BlendedModel) -> list[Matrix]:
    """Of the middle layer; on a GPU of as many layers behind it as make `COLD_BYTES` of one
    endpoint. A few matrices, read again and again, would come from its cache."""
    layers = len(model.layers)
    sample: list[Matrix] = []
    for layer in range(layers // 2, layers):
        sample += _layer_matrices(model, layer)
        held = sum(matrix.instruct.nbytes for matrix in sample)
        if model.device.type != "cuda" or held >= COLD_BYTES:
            break
    return sample


def _layer_matrices(model: BlendedModel, layer: int) -> list[Matrix]:
    """Those of a layer's linear modules."""
    linear = (
        module.pair
        for name, module in model.model.named_modules()
        if f"layers.{layer}." in name and isinstance(module, PairLinear)
    )
    return list(dict.fromkeys(linear))  # one that modules share comes once


def _products(matrices: list[Matrix], inputs: list[torch.Tensor], rows: Rows) -> None:
    for matrix, x in zip(matrices, inputs, strict=True):
        matrix.product(x, rows)
    rows.forget_input()


def _forward_one_row(model: BlendedModel, dial: Dial) -> None:
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    model.groups.begin(StepRows((dial,), (0,), (0,), blended=False))
    model.logits(zero, zero, zero, PackedAttention((1,)))


def _random(model: BlendedModel, rows: int, width: int) -> torch.Tensor:
    """By a generator of its own: a recording that failed leaves torch's unusable."""
    generator = torch.Generator(model.device).manual_seed(0)
    return torch.randn(rows, width, device=model.device, generator=generator).to(model.dtype)


def _time(model: BlendedModel, work: Callable[[], object]) -> float:
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
