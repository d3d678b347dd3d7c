"""What an engine is started with: every default and unit in one place."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeltaDtype = Literal["none", "int8", "int4"]
BlendPolicy = Literal["auto", "pair", "blended"]
AttentionName = Literal["auto", "reference", "triton", "torch"]
MOST_SIZES = 64  # of recordings


@dataclass(frozen=True, slots=True)
class TokenMarks:
    """What the text of single tokens means to think blocks: one value for all requests."""

    soft_ends: frozenset[int] = frozenset()  # for policies that bring none of their own
    blanks: frozenset[int] | None = None  # what may stand before the open tag; None: anything


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """What grammars need to know of the pair's tokens."""

    tokenizer: str  # path of the tokenizer.json
    eos_token_ids: tuple[int, ...]  # what may follow a complete answer; at least one


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine process.

    `None` means: derived at start from the pair and the machine. Nothing changes after start.
    """

    instruct: str  # directory or hub id of the Instruct endpoint
    thinking: str  # directory or hub id of the Thinking endpoint
    device: Device = "auto"
    dtype: Dtype = "auto"
    delta_dtype: DeltaDtype = "none"  # none: both endpoints whole; else Thinking as a difference
    block_size: int = 16  # tokens a KV block
    num_blocks: int | None = None  # KV blocks; None: from kv_cache_bytes
    kv_cache_bytes: int | None = None  # None: a share of the free memory; on a GPU the rest
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that may be in use
    max_model_len: int | None = None  # tokens of prompt and answer together
    max_num_seqs: int = 256  # sequences that run at once
    max_batched_tokens: int = 2048  # tokens a step, prefill and decode together
    async_scheduling: bool | None = None  # None: on a GPU; on a CPU the device is the host
    prefix_caching: bool = True
    lambda_step: float = 0.01  # the grid λ is rounded to
    attention_backend: AttentionName = "auto"  # auto: on a GPU the fastest of those that work
    blend_policy: BlendPolicy = "auto"  # auto: the cheapest; the others force one way
    blend_cache_bytes: int | None = None  # blended weights; None: a share of the free memory
    cuda_graphs: bool = True  # on a GPU decode steps are recorded at start and replayed
    cuda_graph_sizes: tuple[int, ...] = ()  # their rows, ascending; empty: up to max_num_seqs
    torch_compile: bool = True  # what is recorded is compiled
    marks: TokenMarks = field(default_factory=TokenMarks)  # of the pair's vocabulary
    grammar_vocabulary: GrammarVocabulary | None = None  # None: no request may bring a grammar
    threads: int | None = None  # CPU threads of the engine process; None: all cores but one

    def __post_init__(self) -> None:
        cells = 1 / self.lambda_step if self.lambda_step > 0 else 0.0
        if cells < 1 or abs(cells - round(cells)) > 1e-6:
            raise ValueError(
                f"lambda_step must divide 1 evenly, as 0.01 does, not {self.lambda_step}"
            )
        sizes = self.cuda_graph_sizes
        if any(later <= size for size, later in pairwise((0, *sizes))) or len(sizes) > MOST_SIZES:
            raise ValueError(
                f"cuda_graph_sizes must be at most {MOST_SIZES} numbers that ascend, from 1 on, "
                f"not {', '.join(map(str, sizes))}"
            )
