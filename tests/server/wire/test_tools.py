"""Tools and the choice among them are checked, and a bad one is named."""

from typing import Any

import pytest

from tests.server.chat_bodies import named_function, parse, refusal, tool


@pytest.mark.parametrize("choice", [None, "auto", "required", named_function("f")])
def test_tools_are_offered_unless_none_is_to_be_called(choice: Any) -> None:
    assert [it.name for it in parse(tools=[tool("f")], tool_choice=choice).offered_tools] == ["f"]
    assert parse(tools=[tool("f")], tool_choice="none").offered_tools == []
    assert parse().offered_tools == []


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"parallel_tool_calls": False}])
def test_tool_choice_none_and_parallel_tool_calls_are_accepted_without_tools(
    fields: dict[str, Any],
) -> None:
    parse(**fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("f"), tool("no spaces")]}, "tools[1].function.name"),
        ({"tools": [tool("f" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
        ({"tools": [tool("f", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", returns={})]}, "tools[0].function.returns"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [tool("f")]}, "tool_choice"),
        ({"tool_choice": named_function("f")}, "tool_choice.function.name"),
        ({"tool_choice": named_function("g"), "tools": [tool("f")]}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [tool("f")]}, "tool_choice.type"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
def test_a_bad_tool_or_choice_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
