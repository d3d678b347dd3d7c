"""Makes a runner of a loaded pair: measures, chooses and captures before the first step.

In order: it selects the attention backend, measures pair kernels and the cost of each way, sizes
the KV cache and the blend cache, and on a GPU captures CUDA graphs. If decode steps cannot be
captured or compiled, it prints and reports why, and the engine serves without that.
"""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.plan import AttentionBackend
from mi_runtime.attention.reference import ReferenceAttention
from mi_runtime.attention.selector import choose_attention
from mi_runtime.config import EngineConfig
from mi_runtime.errors import PairError
from mi_runtime.execution.compiled_layers import compiled_logits
from mi_runtime.execution.cost_measurement import choose_kernels, measure_costs, with_replays
from mi_runtime.execution.decode_graphs import SIZES, CudaGraphs, DecodeGraphs, Forward, sizes_for
from mi_runtime.execution.memory_sizing import (
    CacheSizes,
    ReservedMemory,
    blocks_of_largest_step,
    blocks_of_longest_sequence,
    cpu_sizes,
    cuda_sizes,
    measured_workspace,
    memory_taken_by,
)
from mi_runtime.execution.runner import Runner
from mi_runtime.kernels.triton_support import launch_errors
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import BlendGroups
from mi_runtime.request import Dial
from mi_runtime.scheduling.planner import NO_COSTS, REMEMBERED, CostModel, Planner

CAPTURED, COMPILED = "captured", "captured and compiled"
COMPILE_SETTING = {CAPTURED: "without torch.compile", COMPILED: "with torch.compile"}
LONGEST_REASON = 300  # characters


@dataclass(frozen=True, slots=True)
class Started:
    """A runner that is ready, and descriptions of what start-up chose."""

    runner: Runner
    num_blocks: int
    attention: str  # the backend, and what was measured
    pair_kernels: str  # up to how many rows they are used
    graphs: str  # what was captured, and why not more


@dataclass(frozen=True, slots=True)
class CaptureTrial:
    """A forward pass that was captured in a trial, and the memory of its CUDA graphs."""

    forward: Forward
    how: str
    stream: torch.cuda.Stream
    first_bytes: int  # of the first and largest graph
    next_bytes: int  # of the next graph


def start_runner(config: EngineConfig, model: BlendedModel) -> Started:
    """Returns a runner for a loaded model. Raises PairError if the device has too little memory."""
    try:
        return _start(config, model)
    except torch.OutOfMemoryError as error:
        raise PairError(
            [f"the GPU ran out of memory at start-up: {_first_sentence(error)}"]
        ) from error


def _start(config: EngineConfig, model: BlendedModel) -> Started:
    attention = choose_attention(
        config.attention_backend, model.layers, model.dtype, model.device, config.block_size
    )
    pair_kernels = choose_kernels(model)
    costs = measure_costs(model) if config.blend_policy == "auto" else NO_COSTS
    started = time.monotonic()
    failures: list[str] = []
    trial = None
    if model.device.type == "cuda":
        sizes, trial = _cuda_sizes(config, model, attention.backend, failures)
    else:
        sizes = cpu_sizes(config, model)
    model.groups.cache.places = sizes.places
    runner = _runner(config, model, attention.backend, sizes.num_blocks, costs)
    how, count = None, 0
    if trial is not None:
        runner.graphs, how = _capture_all(config, model, runner.attention, trial, failures)
        if runner.graphs is not None:
            runner.planner.costs = with_replays(costs, model, runner.graphs)
            count = len(runner.graphs.keys)
    graphs = _graphs_description(how, count, time.monotonic() - started, failures)
    model.groups.start_counting()
    return Started(runner, sizes.num_blocks, attention.description, pair_kernels, graphs)


def _runner(
    config: EngineConfig,
    model: BlendedModel,
    backend: AttentionBackend,
    num_blocks: int,
    costs: CostModel,
) -> Runner:
    planner = Planner(
        config.blend_policy,
        costs,
        _MissingShare(model.groups),
        capacity=model.groups.cache.places,
        endpoints=model.groups.endpoints,
    )
    return Runner(model, planner, num_blocks, config.block_size, backend)


def _cuda_sizes(
    config: EngineConfig, model: BlendedModel, backend: AttentionBackend, failures: list[str]
) -> tuple[CacheSizes, CaptureTrial | None]:
    """Measures memory with a temporary runner, whose KV cache fits the largest step."""
    only_pair = Planner("pair", NO_COSTS, lambda dial: 1.0, 0, model.groups.endpoints)
    # One block more than needed: if the number of blocks and the rows of a graph happened to
    # be equal, torch would compile code that requires it.
    blocks = blocks_of_largest_step(config) + 1
    runner = Runner(model, only_pair, blocks, config.block_size, backend)
    workspace = measured_workspace(config, model, runner)
    trial = _try_capture(config, model, runner.attention, failures)
    del runner
    gc.collect()  # the traceback of a failure keeps its tensors alive
    torch.cuda.empty_cache()
    # Measured last, so that loaded kernels and cuBLAS workspaces count as in use.
    free, total = torch.cuda.mem_get_info(model.device)
    sizes = _graph_sizes(config) if trial else ()
    reserved = ReservedMemory(
        total=total,
        used=total - free,
        workspace=workspace,
        first_graph=trial.first_bytes if trial else 0,
        next_graph=trial.next_bytes if trial else 0,
        num_graphs=len(sizes) * (1 + len(model.groups.endpoints)),
        graphs_per_place=len(sizes),
    )
    return cuda_sizes(config, model, reserved), trial


# --- CUDA graphs ----------------------------------------------------------------------------------


def _try_capture(
    config: EngineConfig, model: BlendedModel, attention: PagedAttention, failures: list[str]
) -> CaptureTrial | None:
    """Returns the first forward pass whose trial capture succeeds; appends the other errors to
    `failures`.
    """
    if not config.cuda_graphs:
        return None
    if attention.backend.name == ReferenceAttention.name:
        failures.append("the reference attention backend cannot be captured")
        return None
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for forward, how in _forwards(config, model):
        try:
            make = partial(_graphs, config, model, attention, forward, stream)
            first, following = _graph_bytes(make)
        except torch.OutOfMemoryError:
            raise
        except _capture_errors() as error:
            failures.append(_failure(model, how, error))
        else:
            return CaptureTrial(forward, how, stream, first, following)
    return None


def _capture_all(
    config: EngineConfig,
    model: BlendedModel,
    attention: PagedAttention,
    trial: CaptureTrial,
    failures: list[str],
) -> tuple[DecodeGraphs | None, str | None]:
    """Captures all graphs; returns them and how they were captured.

    The trial captured only two of them, so others may still fail.
    """
    ways = [(trial.forward, trial.how)]
    if trial.how != CAPTURED:
        ways.append((model.logits, CAPTURED))
    for forward, how in ways:
        try:
            graphs = _graphs(config, model, attention, forward, trial.stream)
            graphs.capture()
        except torch.OutOfMemoryError:
            raise
        except _capture_errors() as error:
            failures.append(_failure(model, how, error))
        else:
            return graphs, how
    return None, None


def _graphs_description(how: str | None, count: int, seconds: float, failures: list[str]) -> str:
    """Describes the CUDA graphs; a bare `none` means that the configuration wants none."""
    made = "none" if how is None else f"{count} {how}, in {seconds:.0f} s"
    return f"{made} ({'; '.join(failures)})" if failures else made


def _graphs(
    config: EngineConfig,
    model: BlendedModel,
    attention: PagedAttention,
    forward: Forward,
    stream: torch.cuda.Stream,
) -> DecodeGraphs:
    return DecodeGraphs(
        model,
        attention,
        CudaGraphs(stream),
        sizes=_graph_sizes(config),
        max_blocks=blocks_of_longest_sequence(config, model),
        forward=forward,
    )


def _graph_sizes(config: EngineConfig) -> tuple[int, ...]:
    return sizes_for(config.max_num_seqs, config.cuda_graph_sizes or SIZES)


def _forwards(config: EngineConfig, model: BlendedModel) -> Iterator[tuple[Forward, str]]:
    if config.torch_compile:
        yield compiled_logits(model), COMPILED
    yield model.logits, CAPTURED


def _graph_bytes(make: Callable[[], DecodeGraphs]) -> tuple[int, int]:
    """Returns the bytes of the first graph, including all buffers, and of the next one."""

    def first() -> DecodeGraphs:
        graphs = make()
        graphs.capture(graphs.keys[:1])
        return graphs

    largest, graphs = memory_taken_by(first)
    return largest, memory_taken_by(lambda: graphs.capture(graphs.keys[1:2]))[0]


def _capture_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException  # a slow import: it loads the compiler

    return *launch_errors(), TorchDynamoException


def _failure(model: BlendedModel, how: str, error: Exception) -> str:
    """Prints the error with its traceback, cleans up, and returns a short description."""
    model.groups.end()  # drops the activations of a forward pass that ended early
    model.groups.cache.forget()
    print(
        f"CUDA graph capture {COMPILE_SETTING[how]} failed: {_first_sentence(error)}",
        file=sys.stderr,
    )
    traceback.print_exception(error)
    return f"{COMPILE_SETTING[how]}: {_causes(error)}"


def _causes(error: BaseException) -> str:
    """Names the error and its first cause, as CUDA's own error names only the consequence."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    sentences = [_first_sentence(one)[:LONGEST_REASON] for one in (error, first)]
    return ", caused by ".join(dict.fromkeys(sentences))


def _first_sentence(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class _MissingShare:
    """The share of a dial's blended weights that the cache lacks, remembered until it changes."""

    def __init__(self, groups: BlendGroups) -> None:
        self._groups = groups
        self._changes = -1
        self._known: dict[Dial, float] = {}

    def __call__(self, dial: Dial) -> float:
        cache = self._groups.cache
        if self._changes != cache.builds + cache.evictions:
            self._changes = cache.builds + cache.evictions
            self._known.clear()
        if len(self._known) > REMEMBERED:
            self._known.clear()
        if dial not in self._known:
            endpoints = self._groups.endpoints
            values = [(name, dial.value_of(name)) for name in self._groups.names]
            keys = [key for key in values if key[1] not in endpoints]
            self._known[dial] = cache.missing(keys) / max(1, len(keys))
        return self._known[dial]
