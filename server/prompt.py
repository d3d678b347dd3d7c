"""From messages to token ids: which template a λ takes, and whether it opens a think block."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mi_runtime.request import Dial
from server.checkpoint import Endpoint
from server.errors import InvalidRequest
from server.reasoning import THINK_OPEN
from server.schemas import FunctionTool, Message, ToolCall
from server.templates import ChatTemplate
from server.vocabulary import Vocabulary

ReasoningTemplate = Literal["auto", "instruct", "thinking"]


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    opens_block: bool  # it ends inside `<think>`


class Prompts:
    """The pair's tokenizer and its two templates.

    `auto` is how the paper ran it: at λ above the threshold the Thinking endpoint's template, else
    Instruct's own.
    """

    def __init__(
        self,
        instruct: Endpoint,
        thinking: Endpoint,
        *,
        template: ReasoningTemplate = "auto",
        think_threshold: float = 0.0,
    ) -> None:
        self.vocabulary = Vocabulary.load(thinking.directory)
        self._instruct = ChatTemplate(instruct)
        self._thinking = ChatTemplate(thinking)
        self._choice = template
        self._think_threshold = think_threshold

    def build_each(
        self,
        messages: Sequence[Message],
        dials: Sequence[Dial],
        tools: Sequence[FunctionTool] = (),
    ) -> list[Prompt]:
        """One prompt a dial; dials that take the same template share it."""
        built: dict[ChatTemplate, Prompt] = {}
        for dial in dials:
            template = self._template(dial)
            if template not in built:
                built[template] = self.build(messages, dial, tools)
        return [built[self._template(dial)] for dial in dials]

    def build(
        self, messages: Sequence[Message], dial: Dial, tools: Sequence[FunctionTool] = ()
    ) -> Prompt:
        """Raises `InvalidRequest` where the template refuses the messages or has no tools."""
        template = self._template(dial)
        if tools and not template.takes_tools:
            raise InvalidRequest("This model's chat template has no place for tools", param="tools")
        text = template.render(
            [_template_view(message) for message in messages], [_tool_view(it) for it in tools]
        )
        return Prompt(
            token_ids=tuple(self.vocabulary.encode(text)),
            # The end alone decides: what the user wrote stands before it.
            opens_block=text.rstrip().endswith(THINK_OPEN),
        )

    def _template(self, dial: Dial) -> ChatTemplate:
        if self._choice == "auto":
            thinks = dial.reasoning_lambda > self._think_threshold
            return self._thinking if thinks else self._instruct
        return self._thinking if self._choice == "thinking" else self._instruct


def _template_view(message: Message) -> dict[str, Any]:
    """A message as templates read it: `developer` is OpenAI's newer word for `system`."""
    view: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        view["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        view["reasoning_content"] = reasoning
    if message.tool_calls:
        view["tool_calls"] = [_call_view(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        view["tool_call_id"] = message.tool_call_id
    return view


def _call_view(call: ToolCall) -> dict[str, Any]:
    """With its arguments as an object, which templates write as JSON; as text if they are none."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _tool_view(tool: FunctionTool) -> dict[str, Any]:
    shown = tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": shown}
