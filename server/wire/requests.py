"""The wire request: what a client may send, with every bound in one place.

Unknown fields are refused, and so are fields of OpenAI's API that have no effect here: a typo or a
missing feature is told, never ignored. `null` means "not given" for every field this server knows.
"""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, TypeVar

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

from server.wire.errors import InvalidRequest, bounded

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
        *("annotations", "audio", "function_call", "functions", "modalities", "moderation"),
        *("prediction", "prompt_cache_options", "prompt_cache_retention", "refusal", "suffix"),
        "web_search_options",
    )
)
"""Known to OpenAI's clients or planned here, without effect so far: refused by name."""

MOST_CHOICES: Final = 128
MOST_CHOICES_OF_PROMPTS: Final = 1024
"""Of a completions request: its prompts times the choices of each."""
MOST_PROMPT_TOKENS: Final = 2**20
MOST_TOOLS: Final = 128
MOST_MESSAGES: Final = 16384

_BRANCHES: Final = frozenset(
    {
        *("(text)", "(parts)", "(one)", "(many)", "(number)", "(groups)", "(fan-out)", "(name)"),
        *("(texts)", "(token ids)", "(lists of token ids)", "(tool)"),
    }
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


_Body = TypeVar("_Body", bound=_Wire)


class TextPart(_Wire):
    """A part of a message's content."""

    type: Literal["text"]
    """Parts of other kinds are refused."""
    text: str
    """Parts are joined as they are."""


def _text_or_parts(value: Any) -> str:
    return "(parts)" if isinstance(value, list) else "(text)"


class CalledFunction(_Wire):
    """What was called."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Its name."""
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(_Wire):
    """A call that the assistant made, in an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    """As the answer gave it; the tool's message names it."""
    type: Literal["function"] = "function"
    """The only value."""
    function: CalledFunction
    """What was called."""


class Message(_Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks; `developer` is OpenAI's newer word for `system`."""
    content: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Tag("(parts)")],
            Discriminator(_text_or_parts),
        ]
        | None
    ) = None
    """Text, or parts of it. Left out or null only where the assistant called tools."""
    name: str | None = None
    """A name for the speaker, where the chat template writes one."""
    reasoning_content: str | None = None
    """Of an assistant's message, the text of its think block, where the chat template writes it."""
    reasoning: str | None = None
    """Another name of `reasoning_content`, which counts first."""
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
    """What a stream has beside its text."""

    include_usage: bool = False
    """One more chunk at the end, without choices, has the usage."""
    include_obfuscation: bool = True
    """Without effect."""


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]
"""A JSON schema; `server.text.grammar_builder` checks it."""


class JsonSchemaFormat(_Wire):
    """The schema of an answer."""

    name: Name
    """For people."""
    description: str | None = None
    """For people."""
    schema_: Annotated[Schema, Field(alias="schema")]
    """What the answer obeys."""
    strict: bool = False
    """Refuse a schema with keywords that cannot be enforced; else they are left unenforced."""


class ResponseFormat(_Wire):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    """Plain text; any JSON object; or JSON of the schema."""
    json_schema: JsonSchemaFormat | None = None
    """With type `json_schema`, and only with it."""


class FunctionTool(_Wire):
    """A function that the model may call."""

    name: Name
    """What the model calls it by."""
    description: str | None = None
    """What it does, for the model."""
    parameters: Schema | None = None
    """The schema of its arguments; without one it takes none."""
    strict: bool = False
    """Hold calls that the model makes by itself to the schema; refuse one that cannot be."""


class Tool(_Wire):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    """The only value."""
    function: FunctionTool
    """The function."""


class NamedFunction(_Wire):
    """Which function."""

    name: Name
    """One of the tools'."""


class NamedTool(_Wire):
    """The one tool that is to be called."""

    type: Literal["function"]
    """The only value."""
    function: NamedFunction
    """Which function."""


def _name_or_tool(value: Any) -> str:
    return "(tool)" if isinstance(value, dict | NamedTool) else "(name)"


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


def _one_or_many(value: Any) -> str:
    return "(many)" if isinstance(value, list) else "(one)"


class LayerLambdas(_Wire):
    """λ by part of a layer."""

    attn: float | None = None
    """Of the attention."""
    mlp: float | None = None
    """Of the FFN."""


def _number_or_parts(value: Any) -> str:
    return "(parts)" if isinstance(value, dict | LayerLambdas) else "(number)"


OfLayers = Annotated[
    Annotated[float, Tag("(number)")] | Annotated[LayerLambdas, Tag("(parts)")],
    Discriminator(_number_or_parts),
]


class GroupLambdas(_Wire):
    """λ by blend group; `server.routing.group_lambdas` checks its ranges and values."""

    default: float | None = None
    """Of every group that is not named; required unless all are."""
    attn: float | None = None
    """Of the attention of every layer that `layers` does not name."""
    mlp: float | None = None
    """Of the FFN of every layer that `layers` does not name."""
    embed: float | None = None
    """Of the embeddings."""
    head: float | None = None
    """Of the head and the norm before it."""
    layers: dict[str, OfLayers] = {}
    """By range of layers, as `"0-11"` or `"3"`: a number, or one for each part."""


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


class GenerationRequest(_Wire):
    """What every request for an answer may say, however its prompt is given.

    None as a sampling default: the pair's own.
    """

    prompt_field: ClassVar[str]
    """What errors about the prompt name."""

    model: str
    """The served name, or an alias that names λ, as `NAME@0.6`."""

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
    """Tokens the answer may have; default: what the context holds."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens before which the answer does not end by itself."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most probable token; default: the pair's own."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the most probable tokens that have this share together; default: the pair's own."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Draw from so many most probable tokens; -1 and 0: off; default: the pair's own."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least probability, as a share of the most probable token's; default: the pair's own."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Above 1, tokens of prompt and answer become less probable; default: the pair's own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logit of every token that the answer has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """The same, times how often it has it."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Added to the logits of tokens, by token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Equal requests with equal seeds draw equally; choices of one request draw apart."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Choices for each prompt; in a fan-out its length, or left out."""
    stop: Annotated[
        Annotated[StopString, Tag("(one)")]
        | Annotated[list[StopString], Field(max_length=4), Tag("(many)")],
        Discriminator(_one_or_many),
    ] = []
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Go on behind the tokens with which the model ends its answers."""

    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Lower ones run earlier, equal ones in order of arrival; the last by priority is preempted
    first. Nothing keeps a request from waiting behind an endless line of lower ones."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    """Requests of different salts share no KV."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Stands in the server's log."""
    metadata: Annotated[
        dict[
            Annotated[str, Field(max_length=64)],
            Annotated[str, Field(max_length=512)],
        ],
        Field(max_length=16),
    ] = {}
    """Stands in the server's log."""

    @property
    def stop_strings(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def answer_limit(self) -> int | None:
        """Tokens the answer may have, if the client set a limit."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives beside the log-probability of each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def choices(self) -> int:
        if isinstance(self.reasoning_lambda, list):
            return len(self.reasoning_lambda)
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    prompt_field = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    """The conversation so far."""
    continue_final_message: bool = False
    """The last message is the assistant's, and the answer goes on where it ends."""
    add_generation_prompt: bool | None = None
    """Whether the prompt opens a new turn of the assistant; default: unless
    `continue_final_message`."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    """Log-probabilities of the answer's tokens, as the model has them before sampling settings."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """So many of the most probable tokens beside each; needs `logprobs`."""
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("(name)")]
            | Annotated[NamedTool, Tag("(tool)")],
            Discriminator(_name_or_tool),
        ]
        | None
    ) = None
    """None, as the model likes, at least one, or the one named; default: auto."""
    parallel_tool_calls: bool = True
    """False: at most one call."""
    response_format: ResponseFormat | None = None
    """The form of the answer."""
    include_reasoning: bool = True
    """Whether the answer has the text of its think block; it is made all the same."""

    store: bool = False
    """Without effect."""
    service_tier: str | None = None
    """Without effect."""
    verbosity: str | None = None
    """Without effect."""
    safety_identifier: str | None = None
    """Without effect."""
    prompt_cache_key: str | None = None
    """Without effect."""

    @property
    def answer_limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def offered_tools(self) -> Sequence[FunctionTool]:
        """The functions that the model may call."""
        if self.tools is None or self.tool_choice == "none":
            return []
        return [tool.function for tool in self.tools]

    @property
    def shows_reasoning(self) -> bool:
        """Whether the answer has the text of its reasoning."""
        return self.include_reasoning and not (self.reasoning and self.reasoning.exclude)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises `InvalidRequest` that names the first bad field."""
    request = _parse(ChatRequest, body)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` differ; give one of them", param="max_tokens"
        )
    check_continuation(request)
    _check_held_continuation(request)
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    _check_tools(request)
    _check_format(request.response_format)
    _check_reasoning_shown(request)
    _check_together(request)
    return request


def _parse(kind: type[_Body], body: bytes) -> _Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _invalid(details[0], kind) from None


def _check_together(request: GenerationRequest) -> None:
    """The rules between fields that all requests share."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    if request.n not in (None, request.choices):
        raise InvalidRequest(
            f"`reasoning_lambda` lists {request.choices} values and `n` is {request.n}; leave `n` "
            "out or make them equal",
            param="n",
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


def _check_format(form: ResponseFormat | None) -> None:
    if form is not None and (form.type == "json_schema") is not (form.json_schema is not None):
        raise InvalidRequest(
            "`response_format.json_schema` goes with `type: json_schema`, and only with it",
            param="response_format.json_schema",
        )


def _check_reasoning_shown(request: ChatRequest) -> None:
    excluded = request.reasoning and request.reasoning.exclude
    said = "include_reasoning" in request.model_fields_set
    if excluded is not None and said and excluded is request.include_reasoning:
        raise InvalidRequest(
            "`include_reasoning` and `reasoning.exclude` contradict each other; give one of them",
            param="reasoning.exclude",
        )


def _invalid(error: ErrorDetails, kind: type[_Wire]) -> InvalidRequest:
    if error["type"] == "json_invalid":
        return InvalidRequest(f"The body is not JSON: {error['msg']}")
    path = [part for part in error["loc"] if part not in _BRANCHES]
    param = _dotted(path)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(_unknown(str(path[-1]), param, kind), param=param)
    if not param:
        return InvalidRequest(f"The body must be an object: {error['msg']}")
    return InvalidRequest(f"`{param}`: {error['msg']}", param=param)


def _unknown(name: str, param: str, kind: type[_Wire]) -> str:
    if name in NOT_IMPLEMENTED:
        return f"`{param}` is not implemented by this server"
    known = [*kind.model_fields, *GroupLambdas.model_fields]
    similar = difflib.get_close_matches(bounded(name, 64), known, n=1)
    hint = f"; did you mean `{similar[0]}`?" if similar else ""
    return f"Unknown field `{param}`{hint}"


def _dotted(path: Sequence[int | str]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{bounded(part, 64)}"
    return bounded(text.removeprefix("."), 200)


# --- Messages for a chat template ----------------------------------------------------------------


class Continuable(Protocol):
    """What says how messages become a prompt."""

    @property
    def messages(self) -> Sequence[Message] | None: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...


def check_continuation(request: Continuable) -> None:
    if not request.continue_final_message:
        return
    if request.add_generation_prompt:
        raise InvalidRequest(
            "`add_generation_prompt` begins a new message and `continue_final_message` goes on "
            "with the last one; give one of them",
            param="add_generation_prompt",
        )
    if not request.messages or request.messages[-1].role != "assistant":
        raise InvalidRequest(
            "`continue_final_message` needs a last message of the assistant",
            param="continue_final_message",
        )
    if request.messages[-1].tool_calls:
        raise InvalidRequest(
            "`continue_final_message` goes on with text, and the last message ends with tool calls",
            param="continue_final_message",
        )


def _check_held_continuation(request: ChatRequest) -> None:
    """A grammar holds the whole answer, and would begin anew behind what stands there already."""
    form = request.response_format
    held = request.tool_choice not in (None, "none", "auto") or (form and form.type != "text")
    if request.continue_final_message and request.messages[-1].text and held:
        raise InvalidRequest(
            "`continue_final_message` with content goes neither with a `response_format` nor with "
            "tools that must be called",
            param="continue_final_message",
        )


# --- Raw prompts ---------------------------------------------------------------------------------

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]],
    Field(min_length=1, max_length=MOST_PROMPT_TOKENS),
]


def _form_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "(text)"
    if value and isinstance(value[0], list):
        return "(lists of token ids)"
    return "(token ids)" if value and isinstance(value[0], int) else "(texts)"


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`: text is text, without template or think block."""

    prompt_field = "prompt"

    prompt: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[
            list[str], Field(min_length=1, max_length=MOST_CHOICES_OF_PROMPTS), Tag("(texts)")
        ]
        | Annotated[TokenIds, Tag("(token ids)")]
        | Annotated[
            list[TokenIds],
            Field(min_length=1, max_length=MOST_CHOICES_OF_PROMPTS),
            Tag("(lists of token ids)"),
        ],
        Discriminator(_form_of_prompt),
    ]
    """One prompt or several, as text or as token ids. Choices are numbered prompt by prompt."""
    add_special_tokens: bool = True
    """Whether the tokenizer puts its own tokens, such as a begin of sequence, before a text."""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """Tokens of the answer; 0 with `echo` scores the prompt alone."""
    echo: bool = False
    """Begin every choice with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probability of each token, beside those of this many best ones; with `echo` of the
    prompt's tokens too, the first of which has none."""
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Only the number of choices, which it means where it is not given."""

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        return self.logprobs if self.echo else None


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Raises `InvalidRequest` that names the first bad field."""
    request = _parse(CompletionRequest, body)
    if request.best_of not in (None, request.choices):
        raise InvalidRequest(
            f"`best_of` ({request.best_of}) other than the number of choices ({request.choices}) "
            "is not implemented by this server",
            param="best_of",
        )
    if len(request.prompts) * request.choices > MOST_CHOICES_OF_PROMPTS:
        raise InvalidRequest(
            f"{len(request.prompts)} prompts with {request.choices} choices each are more than "
            f"{MOST_CHOICES_OF_PROMPTS} choices",
            param="prompt",
        )
    if request.reasoning is not None and request.reasoning.exclude is not None:
        raise InvalidRequest(
            "A completion has no reasoning to leave out", param="reasoning.exclude"
        )
    _check_together(request)
    return request


# --- Tokens --------------------------------------------------------------------------------------


class TokenizeRequest(_Wire):
    """The body of `POST /tokenize`: a text, or messages for the chat template."""

    model: str | None = None
    """The served name or an alias, whose λ chooses the template."""
    prompt: str | None = None
    """A text. Exactly one of `prompt` and `messages` is given."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    """Messages, written by the chat template of the λ."""
    reasoning_lambda: float | None = None
    """λ that chooses the template of `messages`; default: the server's."""
    add_special_tokens: bool = True
    """Whether the tokenizer puts its own tokens before `prompt`; a template writes them itself."""
    add_generation_prompt: bool | None = None
    """Whether the prompt opens a new turn of the assistant; default: unless
    `continue_final_message`."""
    continue_final_message: bool = False
    """The last message is the assistant's, and its end is left open."""
    return_token_strs: bool = False
    """Whether the answer has the text of every token."""


class DetokenizeRequest(_Wire):
    """The body of `POST /detokenize`."""

    model: str | None = None
    """The served name or an alias."""
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**20)]
    """Token ids."""


FIELDS_OF_MESSAGES: Final = ("reasoning_lambda", "add_generation_prompt", "continue_final_message")


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Raises `InvalidRequest` that names the first bad field."""
    request = _parse(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("Give one of `prompt` and `messages`", param="prompt")
    if request.prompt is not None:
        _refuse_fields(request, "messages", *FIELDS_OF_MESSAGES)
    else:
        _refuse_fields(request, "prompt", "add_special_tokens")
    check_continuation(request)
    for index, message in enumerate(request.messages or []):
        _check_message(message, f"messages[{index}]")
    return request


def _refuse_fields(request: TokenizeRequest, needs: str, *names: str) -> None:
    for name in names:
        if name in request.model_fields_set:
            raise InvalidRequest(f"`{name}` needs `{needs}`", param=name)


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Raises `InvalidRequest` that names the first bad field."""
    return _parse(DetokenizeRequest, body)
