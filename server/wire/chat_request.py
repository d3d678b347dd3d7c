"""The body of `POST /v1/chat/completions`."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from server.wire.errors import InvalidRequest
from server.wire.generation_request import GenerationRequest, check_shared_rules
from server.wire.messages import MOST_MESSAGES, Message, check_continuation, check_message
from server.wire.response_format import ResponseFormat, check_response_format
from server.wire.tools import MOST_TOOLS, FunctionTool, Tool, ToolChoice, check_tools
from server.wire.validation import validate_json


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    prompt_field = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    """The conversation so far."""
    continue_final_message: bool = False
    """Continue the last message, which must be the assistant's."""
    add_generation_prompt: bool | None = None
    """Whether the prompt begins a new turn of the assistant; default: true unless
    `continue_final_message`."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    """Return the log-probabilities of the answer's tokens, before any sampling setting applies."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Return this many most probable tokens for each token; allowed only with `logprobs`."""
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """Call none, let the model decide, call at least one, or the named one; default: `auto`."""
    parallel_tool_calls: bool = True
    """False allows at most one call."""
    response_format: ResponseFormat | None = None
    """The form of the content."""
    include_reasoning: bool = True
    """Whether the response contains the text of the think block, which is generated either way."""

    store: bool = False
    """Accepted and ignored."""
    service_tier: str | None = None
    """Accepted and ignored."""
    verbosity: str | None = None
    """Accepted and ignored."""
    safety_identifier: str | None = None
    """Accepted and ignored."""
    prompt_cache_key: str | None = None
    """Accepted and ignored."""

    @property
    def answer_limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def offered_tools(self) -> Sequence[FunctionTool]:
        """The functions that the model may call; none with the choice `none`."""
        if self.tools is None or self.tool_choice == "none":
            return []
        return [tool.function for tool in self.tools]

    @property
    def shows_reasoning(self) -> bool:
        """Whether the answer contains its reasoning."""
        return self.include_reasoning and not (self.reasoning and self.reasoning.exclude)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_chat_request(body: bytes) -> ChatRequest:
    """Returns the request. Raises `InvalidRequest` that names the first bad field."""
    request = validate_json(ChatRequest, body)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest(
            "`top_logprobs` is allowed only with `logprobs: true`", param="top_logprobs"
        )
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` differ; set only one of them",
            param="max_tokens",
        )
    check_continuation(request)
    _check_constrained_continuation(request)
    for index, message in enumerate(request.messages):
        check_message(message, f"messages[{index}]")
    check_tools(request.tools or [], request.tool_choice)
    check_response_format(request.response_format)
    _check_reasoning_shown(request)
    check_shared_rules(request)
    return request


def _check_reasoning_shown(request: ChatRequest) -> None:
    excluded = request.reasoning and request.reasoning.exclude
    given = "include_reasoning" in request.model_fields_set
    if excluded is not None and given and excluded is request.include_reasoning:
        raise InvalidRequest(
            "`include_reasoning` and `reasoning.exclude` contradict each other; set only one of them",
            param="reasoning.exclude",
        )


def _check_constrained_continuation(request: ChatRequest) -> None:
    """Raises `InvalidRequest` for a continued message with a grammar.

    The grammar would start from its beginning, after text that is already there.
    """
    form = request.response_format
    constrained = request.tool_choice not in (None, "none", "auto") or (
        form and form.type != "text"
    )
    if request.continue_final_message and request.messages[-1].text and constrained:
        raise InvalidRequest(
            "`continue_final_message` with content cannot be combined with a `response_format` or "
            "with tools that must be called",
            param="continue_final_message",
        )
