"""The tools that a request offers, and the calls that an assistant's earlier messages made."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from server.wire.errors import InvalidRequest
from server.wire.wire_model import WireModel

MOST_TOOLS: Final = 128

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]
"""A JSON schema; `server.text.grammar_builder` checks it."""


class CalledFunction(WireModel):
    """What was called."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Its name."""
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(WireModel):
    """A call that the assistant made, in an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    """As the answer gave it; the tool's message names it."""
    type: Literal["function"] = "function"
    """The only value."""
    function: CalledFunction
    """What was called."""


class FunctionTool(WireModel):
    """A function that the model may call."""

    name: Name
    """What the model calls it by."""
    description: str | None = None
    """What it does, for the model."""
    parameters: Schema | None = None
    """The schema of its arguments; without one it takes none."""
    strict: bool = False
    """Hold calls that the model makes by itself to the schema; refuse one that cannot be."""


class Tool(WireModel):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    """The only value."""
    function: FunctionTool
    """The function."""


class NamedFunction(WireModel):
    """Which function."""

    name: Name
    """One of the tools'."""


class NamedTool(WireModel):
    """The one tool that is to be called."""

    type: Literal["function"]
    """The only value."""
    function: NamedFunction
    """Which function."""


def _name_or_tool(value: Any) -> str:
    return "(tool)" if isinstance(value, dict | NamedTool) else "(name)"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(name)")]
    | Annotated[NamedTool, Tag("(tool)")],
    Discriminator(_name_or_tool),
]


def check_tools(tools: Sequence[Tool], choice: str | NamedTool | None) -> None:
    """Raises `InvalidRequest` for a name given twice, and for a choice that no tool can satisfy."""
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                f"`tools[{index}].function.name`: there is another tool {name!r}",
                param=f"tools[{index}].function.name",
            )
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"`tool_choice` names {choice.function.name!r}, which is none of the tools",
            param="tool_choice.function.name",
        )
    if choice == "required" and not names:
        raise InvalidRequest("`tool_choice: required` needs `tools`", param="tool_choice")
