"""What a forward costs on this device at a model's own shapes, measured at start-up.

Times the products of one decoder layer's linear modules, for a few row counts, once with single
weights and once as pair product, and one blend of them; scaled to the whole model by parameters.
Takes well under a second on the embedded pair, a few seconds on large ones.
"""

import time
from collections.abc import Callable
from itertools import accumulate

import torch

from mi_runtime.attention import PackedAttention
from mi_runtime.blend import Matrix, PairLinear, weights_of
from mi_runtime.load import BlendedModel
from mi_runtime.planner import CostModel, Curve
from mi_runtime.request import Dial
from mi_runtime.rows import INSTRUCT, Rows, StepRows

ROWS = (1, 8, 32, 128, 512)
REPEATS = 5


@torch.inference_mode()
def measure_costs(model: BlendedModel) -> CostModel:
    """Seconds: the least of a few repeats, as other work on the machine only adds to it."""
    sample = _layer_matrices(model)
    sampled = sum(matrix.parameters for matrix in sample)
    single: list[float] = []
    pair: list[float] = []
    for rows in ROWS:
        scale = _parameters_read(model, rows) / sampled
        inputs = [_random(model, rows, matrix.instruct.shape[1]) for matrix in sample]
        half = torch.full((rows,), 0.5, device=model.device)
        ways = Rows(half, INSTRUCT), Rows(half, None)
        for way, seconds in zip(ways, (single, pair), strict=True):
            seconds.append(scale * _time(model, lambda: _products(sample, inputs, way)))  # noqa: B023
    whole = _parameters(model) / sampled
    build = whole * _time(model, lambda: [one.blend(0.5) for one in sample])
    forward = _time(model, lambda: _forward_one_row(model))
    return CostModel(
        fixed=max(0.0, forward - single[0]),
        single=Curve(ROWS, tuple(accumulate(single, max))),  # more rows never cost less
        pair=Curve(ROWS, tuple(accumulate(pair, max))),
        build=build,
    )


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


def _layer_matrices(model: BlendedModel) -> list[Matrix]:
    """The linear modules of the middle layer."""
    middle = f"layers.{len(model.layers) // 2}."
    return [
        module.pair
        for name, module in model.model.named_modules()
        if middle in name and isinstance(module, PairLinear)
    ]


def _products(matrices: list[Matrix], inputs: list[torch.Tensor], rows: Rows) -> None:
    for matrix, x in zip(matrices, inputs, strict=True):
        matrix.product(x, rows)
    rows.forget_input()


def _forward_one_row(model: BlendedModel) -> None:
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    model.groups.begin(StepRows((Dial(0.0),), (0,), (0,), blended=False))
    model.logits(zero, zero, zero, PackedAttention((1,)))


def _random(model: BlendedModel, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, device=model.device).to(model.dtype)


def _time(model: BlendedModel, work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        _wait(model)
        started = time.perf_counter()
        work()
        _wait(model)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(model: BlendedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
