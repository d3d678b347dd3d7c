"""From a loaded pair to a runner: all that is measured, chosen and recorded before the first step.

In order: the attention backend, the cost of the ways, the memory that KV and blended weights get,
and on CUDA the recordings of decode steps.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mi_runtime.attention import AttentionBackend, PagedAttention
from mi_runtime.attention_backends import choose_attention
from mi_runtime.compiled import compiled_logits
from mi_runtime.config import EngineConfig
from mi_runtime.graphs import CudaGraphs, DecodeGraphs, Forward, sizes_for
from mi_runtime.load import BlendedModel
from mi_runtime.measure import choose_kernels, measure_costs, with_replays
from mi_runtime.pair import PairError
from mi_runtime.planner import NO_COSTS, REMEMBERED, CostModel, Planner
from mi_runtime.request import Dial
from mi_runtime.rows import BlendGroups, Way
from mi_runtime.runner import Runner
from mi_runtime.sizing import (
    Needs,
    Sizes,
    blocks_of_largest,
    blocks_of_longest,
    cpu_sizes,
    cuda_sizes,
    measured_workspace,
    taken_by,
)

RECORDED = "recorded"  # as it runs


@dataclass(frozen=True, slots=True)
class Started:
    runner: Runner
    num_blocks: int
    attention: str  # the backend, and what was measured
    pair_kernels: str  # where they are taken
    graphs: str  # what was recorded


@dataclass(frozen=True, slots=True)
class Recordable:
    """A forward that can be recorded, and what its recordings take."""

    forward: Forward
    how: str
    first: int  # bytes of the largest recording
    each: int  # bytes of the next one


def start_runner(config: EngineConfig, model: BlendedModel) -> Started:
    """Raises PairError where the device has no room for what is left to make."""
    try:
        return _start(config, model)
    except torch.OutOfMemoryError as error:
        raise PairError([f"the GPU is full at start: {_first_sentence(error)}"]) from error


def _start(config: EngineConfig, model: BlendedModel) -> Started:
    attention = choose_attention(
        config.attention_backend, model.layers, model.dtype, model.device, config.block_size
    )
    pair_kernels = choose_kernels(model)
    costs = measure_costs(model) if config.blend_policy == "auto" else NO_COSTS
    started = time.monotonic()
    recordable = None
    if model.device.type == "cuda":
        sizes, recordable = _cuda_sizes(config, model, attention.backend)
    else:
        sizes = cpu_sizes(config, model)
    model.groups.cache.places = sizes.places
    runner = _runner(config, model, attention.backend, sizes.num_blocks, costs)
    graphs = "none"
    if recordable is not None:
        runner.graphs, how = _recorded(config, model, runner.attention, recordable)
        runner.planner.costs = with_replays(costs, model, runner.graphs)
        seconds = time.monotonic() - started
        graphs = f"{len(runner.graphs.forms)} {how}, in {seconds:.0f} s"
    model.groups.start_counting()
    return Started(runner, sizes.num_blocks, attention.told, pair_kernels, graphs)


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


def _recordings(
    config: EngineConfig, model: BlendedModel, attention: PagedAttention, forward: Forward
) -> DecodeGraphs:
    return DecodeGraphs(
        model,
        attention,
        CudaGraphs(),
        max_rows=config.max_num_seqs,
        max_blocks=blocks_of_longest(config, model),
        forward=forward,
    )


def _cuda_sizes(
    config: EngineConfig, model: BlendedModel, backend: AttentionBackend
) -> tuple[Sizes, Recordable | None]:
    """Measured with as much KV as the largest step needs, which is given back."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    only_pair = Planner("pair", NO_COSTS, lambda dial: 1.0, 0, model.groups.endpoints)
    # One more: a forward that is compiled here takes sizes that are equal for one and the same, and
    # rows of recordings are powers of two as steps are.
    blocks = blocks_of_largest(config) + 1
    runner = Runner(model, only_pair, blocks, config.block_size, backend)
    workspace = measured_workspace(config, model, runner)
    recordable = _recordable(config, model, runner.attention)
    sizes = sizes_for(config.max_num_seqs) if recordable else ()
    needs = Needs(
        total=total,
        used=total - free,
        workspace=workspace,
        first_recording=recordable.first if recordable else 0,
        next_recording=recordable.each if recordable else 0,
        recordings=len(sizes) * (1 + len(model.groups.endpoints)),
        recordings_a_place=len(sizes),
    )
    del runner
    torch.cuda.empty_cache()
    return cuda_sizes(config, model, needs), recordable


def _recordable(
    config: EngineConfig, model: BlendedModel, attention: PagedAttention
) -> Recordable | None:
    """The first forward that can be recorded, by trying; why one cannot is printed."""
    for forward, how in _forwards(config, model, attention):
        try:
            first, each = _tried(_recordings(config, model, attention, forward))
        except torch.OutOfMemoryError:
            raise
        except _recording_errors() as error:
            model.groups.end()  # what a forward that ended early left
            print(f"Decode steps are not {how}: {_first_sentence(error)}", file=sys.stderr)
            continue
        return Recordable(forward, how, first, each)
    return None


def _recorded(
    config: EngineConfig, model: BlendedModel, attention: PagedAttention, recordable: Recordable
) -> tuple[DecodeGraphs, str]:
    """All recordings, and how they were made: the trial was of one way, and another may fail yet
    to compile."""
    recordings = _recordings(config, model, attention, recordable.forward)
    try:
        recordings.record()
    except torch.OutOfMemoryError:
        raise
    except _recording_errors() as error:
        if recordable.how == RECORDED:
            raise
        print(f"Decode steps are not {recordable.how}: {_first_sentence(error)}", file=sys.stderr)
    else:
        return recordings, recordable.how
    model.groups.end()
    recordings = _recordings(config, model, attention, model.logits)
    recordings.record()
    return recordings, RECORDED


def _recording_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException  # loads the compiler, which takes time

    return RuntimeError, TorchDynamoException


def _tried(recordings: DecodeGraphs) -> tuple[int, int]:
    """Bytes that the largest recording took, and the one after it."""
    forms = [form for form in recordings.forms if form.way is Way.PAIR]
    device = recordings.device
    first = taken_by(device, lambda: recordings.record(forms[:1]))
    return first, taken_by(device, lambda: recordings.record(forms[:2][-1:]))


def _forwards(
    config: EngineConfig, model: BlendedModel, attention: PagedAttention
) -> Iterator[tuple[Forward, str]]:
    if not config.cuda_graphs or attention.backend.name == "reference":  # which waits for the host
        return
    if config.torch_compile:
        yield compiled_logits(model), f"{RECORDED} and compiled"
    yield model.logits, RECORDED


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _MissingShare:
    """The share of a dial's blended weights that the cache lacks; looked up when it changed."""

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
