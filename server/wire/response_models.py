"""The models of responses, for the OpenAPI document; responses themselves are built without them.

A field with a default is left out if it does not apply. Tests check real responses against these
models.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(_Body):
    message: str
    type: str
    param: str | None
    """The field that the error is about."""
    code: str


class Error(_Body):
    """Every error of every route; in a stream it is the last event."""

    error: ErrorDetail


class CachedTokens(_Body):
    cached_tokens: int
    """Prompt tokens whose KV was in the prefix cache."""


class ReasoningTokens(_Body):
    reasoning_tokens: int
    """Tokens inside think blocks."""


class Usage(_Body):
    prompt_tokens: int
    """Tokens of the prompts, each once, however many choices it has."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class RoutingOfAnswer(_Body):
    """The λ that the request ran at, and why."""

    reasoning_lambda: float | dict[str, Any] | list[float]
    source: str
    """`body`, `model`, `header`, `budget`, `effort`, `enable_thinking` or `default`."""
    profile: str
    """The active profile; `neutral` where the pair was not measured."""
    routing_class: str
    """The routing class whose curve was used."""
    answer_lambda: float = 0.0
    cap: int = 0
    """Most reasoning tokens allowed."""
    expected_reasoning_tokens: float = 0.0
    """Mean at this λ by the profile, but at most the cap."""
    elastic: bool = False
    """Load made it cheaper than requested."""
    forced_close: bool = False
    """The server closed a think block."""


class _Identity(_Body):
    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str


class TopLogprob(_Body):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Body):
    content: list[TokenLogprob]


class FunctionOfCall(_Body):
    name: str
    arguments: str
    """The arguments as JSON, as the model wrote them."""


class Call(_Body):
    id: str
    type: Literal["function"]
    function: FunctionOfCall


class FunctionOfCallDelta(_Body):
    name: str = ""
    """Only in a call's first delta."""
    arguments: str
    """The next piece of the arguments."""


class CallDelta(_Body):
    index: int
    id: str = ""
    """Only in a call's first delta."""
    type: Literal["function"] = "function"
    function: FunctionOfCallDelta


class AnswerMessage(_Body):
    role: Literal["assistant"]
    content: str | None
    """Null where the answer consists of calls only."""
    tool_calls: list[Call] = []
    reasoning_content: str = ""
    reasoning: str = ""
    """The same as `reasoning_content`; clients read one of them."""


TextFinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class _Choice(_Body):
    index: int
    reasoning_lambda: float = 0.0
    """λ of the choice, in a fan-out."""


class ChatChoice(_Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(_Identity):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    routing: RoutingOfAnswer


class ChatDelta(_Body):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[CallDelta] = []
    reasoning_content: str = ""
    reasoning: str = ""


class ChatChunkChoice(_Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(_Identity):
    """The data of one event of a stream; `[DONE]` ends the stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    routing: RoutingOfAnswer | None = None
    """In the first and the last chunk of every choice."""


class TextLogprobs(_Body):
    """Columns of equal length; the first token of an echoed prompt has null in two of them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Choice):
    text: str
    logprobs: TextLogprobs | None
    finish_reason: TextFinishReason


class TextChunkChoice(_Choice):
    text: str
    logprobs: TextLogprobs | None
    finish_reason: TextFinishReason | None


class Completion(_Identity):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    routing: RoutingOfAnswer


class CompletionChunk(_Identity):
    """The data of one event of a stream; `[DONE]` ends the stream."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None
    routing: RoutingOfAnswer | None = None
    """In the first and the last chunk of every choice."""


class PairOfModel(_Body):
    """The served pair, by content and by the endpoints' names."""

    identity: str
    instruct: str
    thinking: str
    layers: int
    delta_dtype: str
    """Format of the Thinking endpoint's difference to Instruct; `none` if it is held in full."""


class Model(_Body):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The served name."""
    parent: str | None
    """The served name, for an alias."""
    max_model_len: int | None
    """Most tokens of prompt and answer together; null while the engine loads."""
    pair: PairOfModel | None
    """Null while the engine loads."""
    reasoning_lambda: float = 0.0
    """λ of an alias."""


class ModelList(_Body):
    object: Literal["list"]
    data: list[Model]


class Tokens(_Body):
    count: int
    max_model_len: int | None
    """Null while the engine loads."""
    tokens: list[int]
    token_strs: list[str] | None
    """The text of each token, if requested."""


class Text(_Body):
    prompt: str


class Status(_Body):
    status: str


class Version(_Body):
    version: str


class ActiveProfile(_Body):
    """The routing curves; docs/routing.md explains every key."""

    object: Literal["profile"]
    name: str
    measured: bool
    """False: this pair was not measured, and classes have no points."""
    think_threshold: float
    default_lambda: float
    adapt: bool
    """Whether routing uses observed lengths."""
    classes: dict[str, Any]
    """By routing class: measured points, λ of every effort, observed lengths."""
    source: dict[str, Any]
    """Where the measurements come from."""
    version: int = 1
    pair: dict[str, Any] = {}
    """The pair that was measured."""
