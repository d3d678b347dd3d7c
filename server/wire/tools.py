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
    """A function and the arguments it was called with."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """The function's name."""
    arguments: str
    """The arguments as JSON, as the model wrote them."""


class ToolCall(WireModel):
    """A call that the assistant made in an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    """The id of the call, which the tool's message repeats."""
    type: Literal["function"] = "function"
    """The only value."""
    function: CalledFunction
    """The function and its arguments."""


class FunctionTool(WireModel):
    """A function that the model may call."""

    name: Name
    """The name that the model calls it by."""
    description: str | None = None
    """What the function does, for the model."""
    parameters: Schema | None = None
    """JSON schema of the arguments; without one, the function takes none."""
    strict: bool = False
    """Also enforce the schema when the model itself decides to call; a schema that cannot be
    enforced is refused."""


class Tool(WireModel):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    """The only value."""
    function: FunctionTool
    """The function."""


class NamedFunction(WireModel):
    """The function to call."""

    name: Name
    """The name of one of the tools."""


class NamedTool(WireModel):
    """The one tool that must be called."""

    type: Literal["function"]
    """The only value."""
    function: NamedFunction
    """The function to call."""


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
                f"`tools[{index}].function.name`: another tool is also named {name!r}",
                param=f"tools[{index}].function.name",
            )
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"`tool_choice` names {choice.function.name!r}, which is not in `tools`",
            param="tool_choice.function.name",
        )
    if choice == "required" and not names:
        raise InvalidRequest("`tool_choice: required` requires `tools`", param="tool_choice")
