"""How much memory the KV cache and blended weights get: what is left of a device after all else.

On CUDA the rest is measured: what is in use once the pair is loaded, what the largest steps need
on top of it, and what recordings of decode steps take. On a CPU, which other programs use as well,
KV and blended weights each take a share of what is free.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from mi_runtime.config import EngineConfig
from mi_runtime.device.memory import free_bytes
from mi_runtime.errors import PairError
from mi_runtime.execution.cost_measurement import blend_bytes
from mi_runtime.execution.runner import Runner
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.scheduler import SCORED_ROWS
from mi_runtime.scheduling.sequence import Sequence

KV_SHARE_OF_CPU = 0.3  # of the free memory
BLEND_SHARE_OF_CPU = 0.2  # of what KV leaves
BLEND_SHARE_OF_CUDA = 0.25  # of what is left of the device
MOST_PLACES = 4  # of it, λ values: each has recordings of its own
GIB = 2**30
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ReservedMemory:
    """Bytes of a CUDA device that KV and blended weights cannot have."""

    total: int  # of the device
    used: int  # by weights, and by other processes
    workspace: int  # by the largest step on top
    first_recording: int
    next_recording: int  # each, at most
    recordings: int  # how many, without those of blended weights
    recordings_a_place: int

    @property
    def graphs(self) -> int:
        return self.first_recording + max(0, self.recordings - 1) * self.next_recording

    @property
    def graphs_a_place(self) -> int:
        return self.recordings_a_place * self.next_recording


@dataclass(frozen=True, slots=True)
class CacheSizes:
    num_blocks: int  # of KV
    places: int  # λ values whose blended weights are kept


def cuda_sizes(config: EngineConfig, model: BlendedModel, reserved: ReservedMemory) -> CacheSizes:
    """Raises PairError, with numbers and advice, where no KV block fits."""
    allowed = int(reserved.total * config.gpu_memory_utilization)
    left = allowed - reserved.used - reserved.workspace - reserved.graphs
    a_place = blend_bytes(model) + reserved.graphs_a_place
    if config.blend_policy == "pair" or not blend_bytes(model):
        places = 0  # nothing would ever lie there
    elif config.blend_cache_bytes is None:
        places = min(MOST_PLACES, int(max(0, left) * BLEND_SHARE_OF_CUDA // a_place))
    else:
        places = config.blend_cache_bytes // a_place
    num_blocks = _blocks(config, model, left - places * a_place)
    if num_blocks < 1:
        raise PairError([_no_room(config, reserved, allowed, left)])
    return CacheSizes(num_blocks, places)


def cpu_sizes(config: EngineConfig, model: BlendedModel) -> CacheSizes:
    free = free_bytes(model.device)
    num_blocks = _blocks(config, model, int(free * KV_SHARE_OF_CPU))
    if num_blocks < 1:
        raise PairError([f"no memory for KV: one block takes {block_bytes(config, model)} bytes"])
    budget = config.blend_cache_bytes
    if budget is None:
        left = max(0, free - num_blocks * block_bytes(config, model))
        budget = int(left * BLEND_SHARE_OF_CPU)
    return CacheSizes(num_blocks, budget // max(1, blend_bytes(model)))


def block_bytes(config: EngineConfig, model: BlendedModel) -> int:
    a_token = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in model.layers)
    return a_token * model.dtype.itemsize * config.block_size


def blocks_of_longest_sequence(config: EngineConfig, model: BlendedModel) -> int:
    """KV blocks of a sequence that fills the context."""
    return -(-(config.max_model_len or model.max_positions) // config.block_size)


def _blocks(config: EngineConfig, model: BlendedModel, left: int) -> int:
    """KV blocks as they were asked for, or as fit, and no more than full sequences could use."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes // block_bytes(config, model)
    useful = blocks_of_longest_sequence(config, model) * config.max_num_seqs
    return min(useful, left // block_bytes(config, model))


def _no_room(config: EngineConfig, reserved: ReservedMemory, allowed: int, left: int) -> str:
    def told(amount: int) -> str:
        return f"{amount / GIB:.1f} GiB"

    return (
        f"no memory for KV: of {told(reserved.total)} on the device, --gpu-memory-utilization "
        f"{config.gpu_memory_utilization:g} allows {told(allowed)}; weights and other processes "
        f"hold {told(reserved.used)}, the largest step takes {told(reserved.workspace)}, recorded "
        f"decode steps {told(reserved.graphs)}: {told(left)} are left. Keep the pair smaller "
        "(--delta-dtype int8), make steps smaller (--max-batched-tokens, --max-num-seqs), or "
        "allow more"
    )


# --- Measuring ------------------------------------------------------------------------------------


def steps_of_all_sizes(config: EngineConfig) -> Iterator[list[Chunk]]:
    """By the pair product, and at an endpoint: the kernels of experts are others there."""
    for dial in (Dial(0.5), Dial(0.0)):
        for power in range(config.max_batched_tokens.bit_length()):
            yield [_chunk(config, 2**power, dial=dial)]


def largest_steps(config: EngineConfig, vocab_size: int) -> Iterator[list[Chunk]]:
    """Steps that need the most memory: a prefill of all tokens that a step may have, as many scored
    positions as it may have, and draws of every sequence, with penalties, from the whole
    vocabulary and from its best half. All in the first `blocks_of_largest_step` KV blocks."""
    yield [_chunk(config, config.max_batched_tokens)]
    scored = min(config.max_batched_tokens, SCORED_ROWS)
    yield [_chunk(config, scored, SamplingParams(prompt_logprobs=1))]
    for top_k in (0, vocab_size // 2):
        drawn = SamplingParams(top_k=top_k, top_p=0.9, repetition_penalty=1.1, logprobs=1)
        yield [_chunk(config, 1, drawn) for _ in range(config.max_num_seqs)]


def blocks_of_largest_step(config: EngineConfig) -> int:
    return -(-config.max_batched_tokens // config.block_size)


def _chunk(
    config: EngineConfig,
    tokens: int,
    sampling: SamplingParams | None = None,
    dial: Dial = Dial(0.5),  # noqa: B008  # frozen
) -> Chunk:
    request = EngineRequest("size", (0,) * tokens, dial, sampling or SamplingParams())
    sequence = Sequence(request)
    sequence.block_table = list(range(-(-tokens // config.block_size)))
    return Chunk(sequence, 0, tokens)


def measured_workspace(config: EngineConfig, model: BlendedModel, runner: Runner) -> int:
    """Most bytes that the largest steps held on a CUDA device, beside what they found there.

    Steps of all sizes run before: kernels are compiled for some of them, which no request shall
    wait for.
    """
    for chunks in steps_of_all_sizes(config):
        runner.launch(chunks)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    for chunks in largest_steps(config, model.vocab_size):
        step = runner.launch(chunks)
        runner.sample(step)
        step.results()
    peak = torch.cuda.max_memory_allocated(model.device)
    torch.cuda.empty_cache()
    return peak - before


def memory_taken_by(act: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes of the CUDA device that are in use after `act` and were free before; what it gave."""
    before = _free_of_cuda()
    result = act()
    return max(0, before - _free_of_cuda()), result


def _free_of_cuda() -> int:
    """What torch keeps for later is free."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
