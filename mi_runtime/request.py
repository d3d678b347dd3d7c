"""What enters and leaves the engine: requests, token events, and the messages that carry them.

Everything here is an immutable value, and nothing imports torch. The commands and reports at the
end are the messages of the pipe between the HTTP process and the engine process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"  # an end-of-sequence or stop token
    COMPLETE = "complete"  # the grammar allows nothing more; the last token is part of the answer
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the caller aborted it
    ERROR = "error"  # this request failed in the engine; the others continue


@dataclass(frozen=True, slots=True)
class Dial:
    """A request's interpolation: λ = 0 is Instruct, λ = 1 is Thinking.

    `groups` holds the blend groups (`embed`, `head`, `N.attn`, `N.mlp`) whose λ differs from
    `reasoning_lambda`, sorted by name, so that equal settings compare equal.
    """

    reasoning_lambda: float
    groups: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def on_grid(value: float, step: float, groups: Mapping[str, float] | None = None) -> "Dial":
        """Returns the dial at `value`, with every λ rounded to the grid of `step`, which divides 1.

        Raises ValueError for a λ outside [0, 1] and for NaN.
        """
        default = _on_grid(value, step)
        rounded = {name: _on_grid(one, step) for name, one in (groups or {}).items()}
        different = ((name, one) for name, one in rounded.items() if one != default)
        return Dial(default, tuple(sorted(different)))

    def value_of(self, group: str) -> float:
        """Returns the λ of one blend group."""
        for name, value in self.groups:
            if name == group:
                return value
        return self.reasoning_lambda


def _on_grid(value: float, step: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"λ must be a number in [0, 1], not {value!r}")
    cells = round(1 / step)
    return round(value * cells) / cells


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sets how tokens are sampled. The defaults do not change the model's distribution."""

    max_tokens: int | None = None  # None: as many as the context holds; 0: none
    min_tokens: int = 0  # end-of-sequence and stop tokens are forbidden before
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer; 1: off
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None: drawn by the engine
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False  # eos_token_ids do not end the answer; stop_token_ids still do
    logprobs: int | None = None  # alternatives of each token (0: the token alone); None: off
    prompt_logprobs: int | None = None  # the same for each token of the prompt

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids


@dataclass(frozen=True, slots=True)
class ThinkPolicy:
    """The tags of a think block as token ids, and how the engine bounds the block."""

    open_id: int
    close_id: int
    opened_by_prompt: bool = False
    cap: int | None = None  # reasoning tokens at which the block is closed by force
    closing: tuple[int, ...] = ()  # written then; contains close_id. Empty: close_id alone
    soft_window: int = 0  # tokens before the cap in which a block closes at a soft end
    close_aliases: frozenset[int] = frozenset()  # tokens that close an open block as close_id does
    forbid_eos: bool = False  # the answer may not end inside the block

    def __post_init__(self) -> None:
        if not self.closing:
            object.__setattr__(self, "closing", (self.close_id,))
        if self.close_id not in self.closing:
            raise ValueError("the closing sequence does not contain the closing tag")
        if self.cap is not None and self.cap < 0:
            raise ValueError(f"the cap must not be negative: {self.cap}")

    @property
    def tail(self) -> tuple[int, ...]:
        """The part of the closing sequence after the tag."""
        return self.closing[self.closing.index(self.close_id) + 1 :]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One answer to compute. A wire request with n > 1 becomes n of these."""

    request_id: str
    prompt: tuple[int, ...]
    dial: Dial
    sampling: SamplingParams = field(default_factory=SamplingParams)
    think: ThinkPolicy | None = None  # None: no think block is tracked
    cache_salt: str = ""  # requests with different salts share no KV
    answer_dial: Dial | None = None  # from the think block's closing tag on; None: `dial`
    priority: int = 0  # lower runs earlier; equal ones in order of arrival
    grammar: str | None = None  # of the answer without the think block, in llguidance's syntax


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model, before temperature, penalties and bias."""

    token: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class Phase(IntEnum):
    """Where a sequence is with respect to its think block."""

    OUTSIDE = 0  # no block was opened yet
    INSIDE = 1
    CLOSED = 2  # none can be opened any more


class RequestRejected(ValueError):
    """The engine cannot accept a request, and kept nothing of it.

    `param` is the field of the request that is wrong, `code` the wire's error code, if it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class TokenEvent(NamedTuple):
    """One new token of one request, or its end without a token (abort, error, max_tokens 0).

    It is a tuple because every token of every step makes one and sends it through the pipe.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None  # set on the terminal event only
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    reasoning_tokens: int = 0  # tokens inside the think block so far
    forced_close: bool = False  # the engine closed the think block
    phase: int = Phase.OUTSIDE.value  # after this token; a plain int, which is pickled faster
    queue_seconds: float = 0.0  # from submission to the first step that ran it
    error: str | RequestRejected | None = None  # with FinishReason.ERROR: what happened
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of each prompt token but the first; set on the first event of a request that wants them."""


# --- The pipe: HTTP process → engine process ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


Command = Submit | Abort  # closing the pipe is the command to stop


# --- The pipe: engine process → HTTP process ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a loaded engine."""

    pair_identity: str  # hex digest of both endpoints' configs and weights
    fingerprint: str  # hex digest of pair and λ grid; part of every key of the prefix cache
    model_type: str
    device: str
    dtype: str
    delta_dtype: str  # of the Thinking endpoint's delta; `none` if both endpoints are complete
    vocab_size: int
    max_model_len: int  # tokens of prompt and answer together
    block_size: int
    num_blocks: int
    layers: int
    weight_bytes: int  # of both endpoints in memory
    peak_bytes: int  # most memory in use at once while loading
    load_seconds: float
    attention: str = "reference"  # the backend, and the times of all that were measured
    graphs: str = "none"  # CUDA graphs: how many, and how they were captured
    pair_kernels: str = ""  # up to how many rows they are used; empty without a GPU


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters of the engine after a step; counters begin at its start."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    running_lambdas: tuple[float, ...] = ()  # distinct, sorted
    waiting_lambdas: tuple[float, ...] = ()
    blend_bytes: int = 0  # of blended weights in memory now
    prefix_queried_tokens: int = 0  # counters from here on
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    endpoint_executions: int = 0  # of a blend group in a forward, by how it was computed
    blended_executions: int = 0
    pair_executions: int = 0
    blend_hits: int = 0
    blend_builds: int = 0
    blend_evictions: int = 0
    forced_closes: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The pair is loaded and checked, and requests are accepted."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The pair cannot be served. The message is for the operator; the process exits with code 2."""

    message: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step produced."""

    events: tuple[TokenEvent, ...]
    stats: EngineStats

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles events as plain tuples, which is five times as fast as named ones."""
        return _step_report, ([tuple(event) for event in self.events], self.stats)


def _step_report(events: list[tuple[Any, ...]], stats: EngineStats) -> StepReport:
    return StepReport(tuple(map(TokenEvent._make, events)), stats)


Report = Ready | LoadFailed | StepReport
