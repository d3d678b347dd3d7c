"""Decides how much memory the KV cache and blended weights get.

On CUDA they get what is left after measuring everything else: what is in use once the pair is
loaded, what the largest steps need in addition, and what CUDA graphs take. On a CPU,
whose memory other programs use as well, each gets a share of what is free.
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

KV_SHARE_OF_CPU = 0.3  # of free memory
BLEND_SHARE_OF_CPU = 0.2  # of what KV leaves free
BLEND_SHARE_OF_CUDA = 0.25  # of what is left on the device
MOST_PLACES = 4  # λ values in that share, as each needs graphs of its own
GIB = 2**30
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ReservedMemory:
    """Bytes of a CUDA device that are not available for KV and blended weights."""

    total: int  # of the device
    used: int  # by weights and by other processes
    workspace: int  # of the largest step
    first_graph: int  # the largest CUDA graph
    next_graph: int  # of each further one, at most
    num_graphs: int  # not counting those for blended weights
    graphs_per_place: int  # number of graphs for each place of the blend cache

    @property
    def graph_bytes(self) -> int:
        """Bytes of the CUDA graphs that do not use blended weights."""
        return self.first_graph + max(0, self.num_graphs - 1) * self.next_graph

    @property
    def graph_bytes_per_place(self) -> int:
        """Bytes of the CUDA graphs that one place of the blend cache adds."""
        return self.graphs_per_place * self.next_graph


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """The sizes of the KV cache and of the blend cache."""

    num_blocks: int  # KV blocks
    places: int  # λ values whose blended weights the blend cache holds


def cuda_sizes(config: EngineConfig, model: BlendedModel, reserved: ReservedMemory) -> CacheSizes:
    """Returns the sizes on a CUDA device.

    Raises PairError, with numbers and advice, if not even one KV block fits.
    """
    allowed = int(reserved.total * config.gpu_memory_utilization)
    left = allowed - reserved.used - reserved.workspace - reserved.graph_bytes
    per_place = blend_bytes(model) + reserved.graph_bytes_per_place
    if config.blend_policy == "pair" or not blend_bytes(model):
        places = 0  # nothing would ever be stored there
    elif config.blend_cache_bytes is None:
        places = min(MOST_PLACES, int(max(0, left) * BLEND_SHARE_OF_CUDA // per_place))
    else:
        places = config.blend_cache_bytes // per_place
    blended = places * per_place
    num_blocks = _blocks(config, model, left - blended)
    if num_blocks < 1:
        missing = block_bytes(config, model) + blended - left
        raise PairError([_no_room(config, reserved, allowed, blended, missing)])
    return CacheSizes(num_blocks, places)


def cpu_sizes(config: EngineConfig, model: BlendedModel) -> CacheSizes:
    """Returns the sizes on a CPU. Raises PairError if not even one KV block fits."""
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
    """Returns the bytes of one KV block, over all layers."""
    per_token = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in model.layers)
    return per_token * model.dtype.itemsize * config.block_size


def blocks_of_longest_sequence(config: EngineConfig, model: BlendedModel) -> int:
    """Returns the KV blocks of a sequence that fills the context."""
    return -(-(config.max_model_len or model.max_positions) // config.block_size)


def _blocks(config: EngineConfig, model: BlendedModel, left: int) -> int:
    """Returns the configured KV blocks, or as many as fit and full sequences could use."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes // block_bytes(config, model)
    useful = blocks_of_longest_sequence(config, model) * config.max_num_seqs
    return min(useful, left // block_bytes(config, model))


def _no_room(
    config: EngineConfig, reserved: ReservedMemory, allowed: int, blended: int, missing: int
) -> str:
    """Returns the message for a device that has `missing` bytes too few for a KV block."""
    if missing <= 0:
        return f"--kv-cache-bytes {config.kv_cache_bytes} is less than one KV block"

    def gib(amount: int) -> str:
        return f"{amount / GIB:.1f} GiB"

    return (
        f"no memory for KV: of {gib(reserved.total)} on the device, --gpu-memory-utilization "
        f"{config.gpu_memory_utilization:g} allows {gib(allowed)}; weights and other processes "
        f"hold {gib(reserved.used)}, the largest step takes {gib(reserved.workspace)}, "
        f"CUDA graphs {gib(reserved.graph_bytes)}, blended weights {gib(blended)}: {gib(missing)} "
        "too little. Use --delta-dtype int8, lower --max-batched-tokens or --max-num-seqs, or "
        "raise --gpu-memory-utilization"
    )


# --- Measuring ------------------------------------------------------------------------------------


def steps_of_all_sizes(config: EngineConfig) -> Iterator[list[Chunk]]:
    """Yields prefill steps of all sizes by the pair product, and at an endpoint.

    Expert kernels of the two differ.
    """
    for dial in (Dial(0.5), Dial(0.0)):
        for power in range(config.max_batched_tokens.bit_length()):
            yield [_chunk(config, 2**power, dial=dial)]


def largest_steps(config: EngineConfig, vocab_size: int) -> Iterator[list[Chunk]]:
    """Yields the steps that need the most memory.

    One prefills as many tokens as a step may have, one scores as many prompt positions as a step
    may, and two sample a token for every sequence with penalties, from the whole vocabulary and
    from its best half. They use only the first `blocks_of_largest_step` KV blocks.
    """
    yield [_chunk(config, config.max_batched_tokens)]
    scored = min(config.max_batched_tokens, SCORED_ROWS)
    yield [_chunk(config, scored, SamplingParams(prompt_logprobs=1))]
    for top_k in (0, vocab_size // 2):
        sampling = SamplingParams(top_k=top_k, top_p=0.9, repetition_penalty=1.1, logprobs=1)
        yield [_chunk(config, 1, sampling) for _ in range(config.max_num_seqs)]


def blocks_of_largest_step(config: EngineConfig) -> int:
    """Returns the KV blocks that `largest_steps` use."""
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
    """Returns the most bytes that the largest steps allocate on a CUDA device.

    Steps of all sizes run first, so that no request waits for kernels to be compiled.
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
    """Returns the bytes of the CUDA device that `act` takes, and the result of `act`."""
    before = _free_of_cuda()
    result = act()
    return max(0, before - _free_of_cuda()), result


def _free_of_cuda() -> int:
    """Returns the free bytes of the device, counting what torch only caches."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
