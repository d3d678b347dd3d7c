"""The wire request: what a client may send, with every bound in one place.

Unknown fields are refused, and so are fields of OpenAI's API that have no effect here: a typo or a
missing feature is told, never ignored. `null` means "not given" for every field this server knows.
"""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from server.errors import InvalidRequest, bounded

ACCEPTED_WITHOUT_EFFECT: Final = (
    "store",
    "service_tier",
    "verbosity",
    "safety_identifier",
    "prompt_cache_key",
    "stream_options.include_obfuscation",
)

NOT_IMPLEMENTED: Final = frozenset(
    (
        *("audio", "continue_final_message"),
        *("function_call", "functions", "modalities", "moderation"),
        *("parallel_tool_calls", "prediction", "prompt_cache_options"),
        *("prompt_cache_retention", "priority"),
        *("tool_call_id", "tool_calls", "tool_choice", "tools"),
        "web_search_options",
    )
)
"""Known to OpenAI's clients or planned here, without effect so far: refused by name."""

MOST_CHOICES: Final = 128

_BRANCHES: Final = frozenset(
    {"(text)", "(parts)", "(one)", "(many)", "(number)", "(groups)", "(fan-out)", "(name)"}
)
"""Union tags that pydantic puts into the path of an error."""


class _Wire(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | NOT_IMPLEMENTED
        return {key: value for key, value in data.items() if value is not None or key not in known}


class TextPart(_Wire):
    type: Literal["text"]
    text: str


def _text_or_parts(value: Any) -> str:
    return "(parts)" if isinstance(value, list) else "(text)"


class Message(_Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Tag("(parts)")],
        Discriminator(_text_or_parts),
    ]
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Wire):
    include_usage: bool = False
    include_obfuscation: bool = True  # without effect


class ResponseFormat(_Wire):
    type: Literal["text"]


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _one_or_many(value: Any) -> str:
    return "(many)" if isinstance(value, list) else "(one)"


class LayerLambdas(_Wire):
    attn: float | None = None
    mlp: float | None = None


def _number_or_parts(value: Any) -> str:
    return "(parts)" if isinstance(value, dict | LayerLambdas) else "(number)"


OfLayers = Annotated[
    Annotated[float, Tag("(number)")] | Annotated[LayerLambdas, Tag("(parts)")],
    Discriminator(_number_or_parts),
]


class GroupLambdas(_Wire):
    """λ by blend group; `server.groups` checks its ranges and values."""

    default: float | None = None
    attn: float | None = None
    mlp: float | None = None
    embed: float | None = None
    head: float | None = None
    layers: dict[str, OfLayers] = {}


def _form_of_lambda(value: Any) -> str:
    if isinstance(value, list):
        return "(fan-out)"
    return "(groups)" if isinstance(value, dict | GroupLambdas) else "(number)"


Budget = Annotated[int, Field(ge=-1, lt=2**31)]
"""Reasoning tokens; -1: none set."""


EffortName = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _name_or_number(value: Any) -> str:
    return "(name)" if isinstance(value, str) else "(number)"


Effort = Annotated[
    Annotated[EffortName, Tag("(name)")] | Annotated[float, Field(ge=0, le=1), Tag("(number)")],
    Discriminator(_name_or_number),
]
"""OpenAI's names, or a place between the cheapest (0) and the best (1) of the profile's front."""


class Thinking(_Wire):
    """Anthropic's form: whether to think, and with `enabled` a budget."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Budget | None = None


class Reasoning(_Wire):
    """OpenRouter's form."""

    effort: Effort | None = None
    max_tokens: Budget | None = None
    """Budget of reasoning tokens, in place of an effort."""
    enabled: bool | None = None
    exclude: bool | None = None
    """true: think, and leave the reasoning out of the answer."""


class TemplateOptions(_Wire):
    """Of `chat_template_kwargs`, what this server knows; no template gets them."""

    enable_thinking: bool | None = None


class ChatRequest(_Wire):
    """The body of `POST /v1/chat/completions`. None as a sampling default: the pair's own."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]

    reasoning_lambda: (
        Annotated[
            Annotated[float, Tag("(number)")]
            | Annotated[GroupLambdas, Tag("(groups)")]
            | Annotated[
                list[float], Field(min_length=1, max_length=MOST_CHOICES), Tag("(fan-out)")
            ],
            Discriminator(_form_of_lambda),
        ]
        | None
    ) = None
    """λ: a number, one for each blend group, or a list with a choice for each of its numbers."""
    answer_lambda: float | None = None
    """λ from the end of the think block on; default: unchanged."""
    thinking_token_budget: Budget | None = None
    """vLLM's name for a budget of reasoning tokens: it chooses λ, and is a hard cap."""
    thinking_budget: Budget | None = None
    """Qwen's name for the same budget."""
    thinking: Thinking | None = None
    """Anthropic's form: a budget, or thinking on or off."""
    reasoning_effort: Effort | None = None
    """OpenAI's form: how much of what reasoning gains, by the active profile."""
    reasoning: Reasoning | None = None
    """OpenRouter's form: effort or budget, on or off, shown or not."""
    enable_thinking: bool | None = None
    """Qwen's form: false is λ = 0, true the server's default where that thinks."""
    chat_template_kwargs: TemplateOptions | None = None
    """vLLM's place for `enable_thinking`."""
    routing_class: Annotated[str, Field(min_length=1, max_length=64)] = "default"
    """Kind of work, whose curve of the profile applies; `default` where the profile has no such."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Annotated[
        Annotated[StopString, Tag("(one)")]
        | Annotated[list[StopString], Field(max_length=4), Tag("(many)")],
        Discriminator(_one_or_many),
    ] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    stream: bool = False
    stream_options: StreamOptions | None = None
    include_reasoning: bool = True
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[
        dict[
            Annotated[str, Field(max_length=64)],
            Annotated[str, Field(max_length=512)],
        ],
        Field(max_length=16),
    ] = {}

    store: bool = False
    service_tier: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stop_strings(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def answer_limit(self) -> int | None:
        """Tokens the answer may have, if the client set a limit."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def choices(self) -> int:
        if isinstance(self.reasoning_lambda, list):
            return len(self.reasoning_lambda)
        return 1 if self.n is None else self.n

    @property
    def shows_reasoning(self) -> bool:
        """Whether the answer has the text of its reasoning."""
        return self.include_reasoning and not (self.reasoning and self.reasoning.exclude)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises `InvalidRequest` that names the first bad field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _invalid(details[0]) from None
    _check_together(request)
    return request


def _check_together(request: ChatRequest) -> None:
    """The rules between fields."""
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` differ; give one of them", param="max_tokens"
        )
    if request.n not in (None, request.choices):
        raise InvalidRequest(
            f"`reasoning_lambda` lists {request.choices} values and `n` is {request.n}; leave `n` "
            "out or make them equal",
            param="n",
        )
    excluded = request.reasoning and request.reasoning.exclude
    said = "include_reasoning" in request.model_fields_set
    if excluded is not None and said and excluded is request.include_reasoning:
        raise InvalidRequest(
            "`include_reasoning` and `reasoning.exclude` contradict each other; give one of them",
            param="reasoning.exclude",
        )


def _invalid(error: ErrorDetails) -> InvalidRequest:
    if error["type"] == "json_invalid":
        return InvalidRequest(f"The body is not JSON: {error['msg']}")
    path = [part for part in error["loc"] if part not in _BRANCHES]
    param = _dotted(path)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(_unknown(str(path[-1]), param), param=param)
    if not param:
        return InvalidRequest(f"The body must be an object: {error['msg']}")
    return InvalidRequest(f"`{param}`: {error['msg']}", param=param)


def _unknown(name: str, param: str) -> str:
    if name in NOT_IMPLEMENTED:
        return f"`{param}` is not implemented by this server"
    known = [*ChatRequest.model_fields, *GroupLambdas.model_fields]
    similar = difflib.get_close_matches(bounded(name, 64), known, n=1)
    hint = f"; did you mean `{similar[0]}`?" if similar else ""
    return f"Unknown field `{param}`{hint}"


def _dotted(path: Sequence[int | str]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{bounded(part, 64)}"
    return bounded(text.removeprefix("."), 200)
