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
        *("annotations", "audio", "chat_template_kwargs", "continue_final_message"),
        *("enable_thinking", "function_call", "functions", "modalities", "moderation"),
        *("prediction", "prompt_cache_options"),
        *("prompt_cache_retention", "priority", "reasoning", "reasoning_effort"),
        *("refusal", "routing_class", "web_search_options"),
    )
)
"""Known to OpenAI's clients or planned here, without effect so far: refused by name."""

MOST_CHOICES: Final = 128
MOST_TOOLS: Final = 128

_BRANCHES: Final = frozenset(
    {"(text)", "(parts)", "(one)", "(many)", "(number)", "(groups)", "(fan-out)"}
    | {"(name)", "(tool)"}
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


class CalledFunction(_Wire):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(_Wire):
    """A call that the assistant made, in an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Tag("(parts)")],
            Discriminator(_text_or_parts),
        ]
        | None
    ) = None
    """Left out or null only where the assistant called tools."""
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] = []
    """Of the assistant."""
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    """Of a tool's message: which call it answers."""

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Wire):
    include_usage: bool = False
    include_obfuscation: bool = True  # without effect


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]
"""A JSON schema; `server.constraint` checks it."""


class JsonSchemaFormat(_Wire):
    name: Name
    description: str | None = None  # for people
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool = False
    """Refuse a schema with keywords that cannot be enforced; else they are left unenforced."""


class ResponseFormat(_Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class FunctionTool(_Wire):
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    """The schema of its arguments; without one it takes none."""
    strict: bool = False
    """Hold calls that the model makes by itself to the schema; refuse one that cannot be."""


class Tool(_Wire):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(_Wire):
    name: Name


class NamedTool(_Wire):
    type: Literal["function"]
    function: NamedFunction


def _name_or_tool(value: Any) -> str:
    return "(tool)" if isinstance(value, dict | NamedTool) else "(name)"


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


class Thinking(_Wire):
    """Anthropic's form of a budget."""

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=0, lt=2**31)]


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
    """vLLM's name for a hard cap on reasoning tokens; it does not choose λ yet."""
    thinking_budget: Budget | None = None
    """Qwen's name for the same cap."""
    thinking: Thinking | None = None
    """Anthropic's name for the same cap."""

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

    tools: Annotated[list[Tool], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("(name)")]
            | Annotated[NamedTool, Tag("(tool)")],
            Discriminator(_name_or_tool),
        ]
        | None
    ) = None
    """Default: auto."""
    parallel_tool_calls: bool = True
    """False: at most one call."""

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
    def budgets(self) -> dict[str, int]:
        """Every budget of reasoning tokens that is written, by its field."""
        said = {
            "thinking_token_budget": self.thinking_token_budget,
            "thinking_budget": self.thinking_budget,
            "thinking": None if self.thinking is None else self.thinking.budget_tokens,
        }
        return {name: value for name, value in said.items() if value is not None}

    @property
    def reasoning_cap(self) -> int | None:
        """Reasoning tokens after which the think block is closed by force."""
        cap = next(iter(self.budgets.values()), -1)
        return None if cap < 0 else cap

    @property
    def offered_tools(self) -> Sequence[FunctionTool]:
        """The functions that the model may call."""
        if self.tools is None or self.tool_choice == "none":
            return []
        return [tool.function for tool in self.tools]

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
    budgets = request.budgets
    if len(set(budgets.values())) > 1:
        listed = ", ".join(f"{value} (`{name}`)" for name, value in budgets.items())
        raise InvalidRequest(
            f"The request names different budgets of reasoning tokens: {listed}; give one of them",
            param=list(budgets)[-1],
        )
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    _check_tools(request)
    form = request.response_format
    if form is not None and (form.type == "json_schema") is not (form.json_schema is not None):
        raise InvalidRequest(
            "`response_format.json_schema` goes with `type: json_schema`, and only with it",
            param="response_format.json_schema",
        )


def _check_message(message: Message, path: str) -> None:
    """Which fields a role needs, and which it may have."""
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"`{path}.content`: Field required", param=f"{path}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"`{path}.tool_calls` are the assistant's, not of role {message.role!r}",
            param=f"{path}.tool_calls",
        )
    if (message.tool_call_id is not None) is not (message.role == "tool"):
        raise InvalidRequest(
            f"`{path}.tool_call_id` goes with role 'tool', and only with it",
            param=f"{path}.tool_call_id",
        )


def _check_tools(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or []]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                f"`tools[{index}].function.name`: there is another tool {name!r}",
                param=f"tools[{index}].function.name",
            )
    choice = request.tool_choice
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"`tool_choice` names {choice.function.name!r}, which is none of the tools",
            param="tool_choice.function.name",
        )
    if choice == "required" and not names:
        raise InvalidRequest("`tool_choice: required` needs `tools`", param="tool_choice")


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
