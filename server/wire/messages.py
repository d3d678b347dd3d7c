"""The messages of a conversation, and the fields that say how they become a prompt."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import Discriminator, Field, Tag

from server.wire.errors import InvalidRequest
from server.wire.tools import MOST_TOOLS, ToolCall
from server.wire.wire_model import WireModel

MOST_MESSAGES: Final = 16384


class TextPart(WireModel):
    """A part of a message's content."""

    type: Literal["text"]
    """The only kind of part; others are refused."""
    text: str
    """The text; the parts of a message are joined without separators."""


def _text_or_parts(value: Any) -> str:
    return "(parts)" if isinstance(value, list) else "(text)"


class Message(WireModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Author of the message; `developer` is OpenAI's newer name of `system`."""
    content: (
        Annotated[
            Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Tag("(parts)")],
            Discriminator(_text_or_parts),
        ]
        | None
    ) = None
    """Text, or parts of text. It may be left out or null only if the assistant called tools."""
    name: str | None = None
    """Name of the author; used if the chat template writes it."""
    reasoning_content: str | None = None
    """Text of the think block of an assistant's message; used if the chat template writes it."""
    reasoning: str | None = None
    """Another name of `reasoning_content`; if both are given, `reasoning_content` is used."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] = []
    """The calls that the assistant made in this message."""
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    """The id of the call whose result a tool's message contains."""

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Continuable(Protocol):
    """The fields that say how messages become a prompt."""

    @property
    def messages(self) -> Sequence[Message] | None: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...


def check_continuation(request: Continuable) -> None:
    """Raises `InvalidRequest` if the last message is to be continued and cannot be."""
    if not request.continue_final_message:
        return
    if request.add_generation_prompt:
        raise InvalidRequest(
            "`add_generation_prompt` begins a new message and `continue_final_message` "
            "continues the last one; set only one of them",
            param="add_generation_prompt",
        )
    if not request.messages or request.messages[-1].role != "assistant":
        raise InvalidRequest(
            "`continue_final_message` requires a last message of role 'assistant'",
            param="continue_final_message",
        )
    if request.messages[-1].tool_calls:
        raise InvalidRequest(
            "`continue_final_message` continues text, but the last message ends with tool calls",
            param="continue_final_message",
        )


def check_message(message: Message, path: str) -> None:
    """Raises `InvalidRequest` if a field is missing or not allowed for the message's role.

    `path` names the message in the error: `messages[0]`.
    """
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"`{path}.content`: Field required", param=f"{path}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"`{path}.tool_calls` is allowed only for role 'assistant', not {message.role!r}",
            param=f"{path}.tool_calls",
        )
    if (message.tool_call_id is not None) is not (message.role == "tool"):
        raise InvalidRequest(
            f"`{path}.tool_call_id` is required for role 'tool' and not allowed for other roles",
            param=f"{path}.tool_call_id",
        )
