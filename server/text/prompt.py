"""Turns messages into token ids, by the chat template that the request's λ selects.

A message that is to be continued is rendered with a mark at its end, and the text is cut at the
mark. So it does not matter what a template writes after a message, or strips from it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Literal

from mi_runtime.request import Dial
from server.text.chat_template import ChatTemplate
from server.text.checkpoint import EndpointText
from server.text.reasoning_parser import THINK_CLOSE, THINK_OPEN
from server.text.vocabulary import Vocabulary
from server.wire.errors import InvalidRequest
from server.wire.messages import Message
from server.wire.tools import FunctionTool, ToolCall

ReasoningTemplate = Literal["auto", "instruct", "thinking"]

MARK: Final = "\ue000end of the final message\ue001"
"""Private characters, which templates pass through and nobody writes."""


class Ending(Enum):
    """Where a prompt of messages ends."""

    NEW_TURN = auto()  # before the assistant's first token
    LAST_TURN = auto()  # after the last message, which is complete
    IN_LAST_MESSAGE = auto()  # the last message is the assistant's, and the answer continues it

    @classmethod
    def of(cls, *, continues: bool, add_generation_prompt: bool | None) -> "Ending":
        if continues:
            return cls.IN_LAST_MESSAGE
        return cls.LAST_TURN if add_generation_prompt is False else cls.NEW_TURN


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, and how the answer starts."""

    token_ids: tuple[int, ...]
    opens_block: bool  # the prompt ends inside `<think>`
    is_raw: bool = False  # text without a template, in which a think block is text as well


class PromptBuilder:
    """Builds prompts with the pair's tokenizer and its two templates.

    `auto` follows the paper: λ above the think threshold takes the Thinking endpoint's template,
    and any other takes Instruct's. The threshold is read for each prompt, because the profile that
    sets it is known only when the pair is loaded.
    """

    def __init__(
        self,
        instruct: EndpointText,
        thinking: EndpointText,
        *,
        template: ReasoningTemplate = "auto",
        think_threshold: Callable[[], float] = lambda: 0.0,
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
        ending: Ending = Ending.NEW_TURN,
        tools: Sequence[FunctionTool] = (),
    ) -> list[Prompt]:
        """Returns one prompt for each dial; dials with the same template share it.

        Raises `InvalidRequest` as `build` does.
        """
        built: dict[ChatTemplate, Prompt] = {}
        for dial in dials:
            template = self._template(dial)
            if template not in built:
                built[template] = self.build(messages, dial, ending, tools)
        return [built[self._template(dial)] for dial in dials]

    def build(
        self,
        messages: Sequence[Message],
        dial: Dial,
        ending: Ending = Ending.NEW_TURN,
        tools: Sequence[FunctionTool] = (),
    ) -> Prompt:
        """Returns the prompt of `messages`, with `tools` as the functions offered.

        Raises `InvalidRequest` if the template refuses the messages or cannot write tools.
        """
        template = self._template(dial)
        if tools and not template.takes_tools:
            raise InvalidRequest("This model's chat template does not support tools", param="tools")
        views = [_template_view(message) for message in messages]
        shown = [_tool_view(tool) for tool in tools]
        if ending is Ending.IN_LAST_MESSAGE:
            text, opens_block = _continued(template, views, shown)
            return Prompt(tuple(self.vocabulary.encode(text)), opens_block)
        new_turn = ending is Ending.NEW_TURN
        text = template.render(views, shown, add_generation_prompt=new_turn)
        return Prompt(
            token_ids=tuple(self.vocabulary.encode(text)),
            # Only the end counts: the user's own text comes before it.
            opens_block=text.rstrip().endswith(THINK_OPEN),
        )

    def _template(self, dial: Dial) -> ChatTemplate:
        if self._choice == "auto":
            thinks = dial.reasoning_lambda > self._think_threshold()
            return self._thinking if thinks else self._instruct
        return self._thinking if self._choice == "thinking" else self._instruct


def _continued(
    template: ChatTemplate, views: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[str, bool]:
    """Returns the prompt up to the end of the last message, and whether its think block is open.

    A message that has only reasoning, in its own field or as `<think>` without an end, is continued
    inside the block. A template that does not write the field gets the block as content.
    """
    *before, last = views
    reasoning = _open_reasoning(last)
    written = [last | {"content": last["content"] + MARK}]
    if reasoning is not None:
        as_field = {"content": "", "reasoning_content": reasoning + MARK}
        as_content = {"content": f"{THINK_OPEN}\n{reasoning}{MARK}", "reasoning_content": None}
        written = [last | as_field, last | as_content]
    for view in written:
        rendered = template.render([*before, view], tools, add_generation_prompt=False)
        text, mark, _ = rendered.rpartition(MARK)
        if mark:
            return text, reasoning is not None
    raise InvalidRequest(
        "This model's chat template changes the end of the last message, so "
        "`continue_final_message` does not work with it",
        param="continue_final_message",
    )


def _open_reasoning(message: dict[str, Any]) -> str | None:
    """Returns the reasoning of a message that has only reasoning, or else None."""
    content: str = message["content"]
    before, opened, inside = content.partition(THINK_OPEN)
    if opened and THINK_CLOSE not in inside and not before.strip():
        return inside.removeprefix("\n")
    return None if content else message.get("reasoning_content")


def _template_view(message: Message) -> dict[str, Any]:
    """Returns a message as templates expect it; `developer` is OpenAI's newer name of `system`."""
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
    """Returns a call with its arguments as an object if they are one, or else as text.

    Templates write the object as JSON.
    """
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
