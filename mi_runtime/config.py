"""The configuration of an engine: every setting with its default and its unit."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeltaDtype = Literal["none", "int8", "int4"]
BlendPolicy = Literal["auto", "pair", "blended"]
AttentionName = Literal["auto", "reference", "triton", "torch"]
MAX_GRAPH_SIZES = 64  # row counts for which CUDA graphs are captured


@dataclass(frozen=True, slots=True)
class TokenMarks:
    """Token ids of a vocabulary that matter to think blocks, the same for all requests."""

    soft_ends: frozenset[int] = frozenset()  # end a sentence or a line
    whitespace: frozenset[int] | None = None  # may precede the open tag; None: any token may


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """The vocabulary for which grammars are compiled."""

    tokenizer: str  # path of tokenizer.json
    eos_token_ids: tuple[int, ...]  # may follow a complete answer; at least one


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine process.

    Except for `grammar_vocabulary`, None means that the value is derived at start from the pair and
    the machine. Nothing changes after start. Raises ValueError for a `lambda_step` or
    `cuda_graph_sizes` that cannot be used.
    """

    instruct: str  # directory of the Instruct endpoint
    thinking: str  # directory of the Thinking endpoint
    device: Device = "auto"
    dtype: Dtype = "auto"
    delta_dtype: DeltaDtype = "none"  # else Thinking is stored as a rounded difference
    block_size: int = 16  # tokens per KV block
    num_blocks: int | None = None  # KV blocks; None: from kv_cache_bytes
    kv_cache_bytes: int | None = None  # None: a share of free memory; on a GPU all that is left
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that may be in use
    max_model_len: int | None = None  # tokens of prompt and answer together
    max_num_seqs: int = 256  # sequences that run at once
    max_batched_tokens: int = 2048  # tokens per step, prefill and decode together
    async_scheduling: bool | None = None  # None: on for a GPU, off for a CPU
    prefix_caching: bool = True
    lambda_step: float = 0.01  # the grid to which λ is rounded
    attention_backend: AttentionName = "auto"  # auto: on a GPU the fastest that works
    blend_policy: BlendPolicy = "auto"  # auto: the cheapest way; the others force one
    blend_cache_bytes: int | None = None  # blended weights; None: a share of the free memory
    cuda_graphs: bool = True  # on a GPU, capture decode steps at start and replay them
    cuda_graph_sizes: tuple[int, ...] = ()  # row counts, ascending; empty: up to max_num_seqs
    torch_compile: bool = True  # compile the decode steps that are captured
    marks: TokenMarks = field(default_factory=TokenMarks)
    grammar_vocabulary: GrammarVocabulary | None = None  # None: grammars are rejected
    threads: int | None = None  # CPU threads of the engine process; None: all cores but one

    def __post_init__(self) -> None:
        cells = 1 / self.lambda_step if self.lambda_step > 0 else 0.0
        if cells < 1 or abs(cells - round(cells)) > 1e-6:
            raise ValueError(
                f"--lambda-step must divide 1 evenly, as 0.01 does, not {self.lambda_step}"
            )
        sizes = self.cuda_graph_sizes
        ascending = all(size < later for size, later in pairwise((0, *sizes)))
        if not ascending or len(sizes) > MAX_GRAPH_SIZES:
            raise ValueError(
                f"--cuda-graph-sizes must be at most {MAX_GRAPH_SIZES} ascending numbers above 0, "
                f"not {', '.join(map(str, sizes))}"
            )
