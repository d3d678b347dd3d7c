"""The messages of a chat are checked by their roles, and a bad one is named."""

from typing import Any

import pytest

from tests.server.chat_bodies import CALL, CALLING, USER, parse, refusal


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_that_called_tools_needs_no_content(content: dict[str, Any]) -> None:
    message = parse(messages=[CALLING | content]).messages[0]
    assert message.text == ""
    assert message.tool_calls[0].function.name == "f"


def test_a_tools_message_names_the_call_it_answers() -> None:
    answer = {"role": "tool", "tool_call_id": "c", "content": "6"}
    assert parse(messages=[USER, CALLING, answer]).messages[2].tool_call_id == "c"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "messages[0].content"),
        ({"messages": [USER | {"tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [USER, USER | {"tool_calls": [CALL]}]}, "messages[1].tool_calls"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [CALLING | {"tool_calls": []}]}, "messages[0].content"),
        (
            {"messages": [CALLING | {"tool_calls": [CALL | {"type": "custom"}]}]},
            "messages[0].tool_calls[0].type",
        ),
        (
            {"messages": [CALLING | {"tool_calls": [CALL | {"function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_a_bad_message_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
