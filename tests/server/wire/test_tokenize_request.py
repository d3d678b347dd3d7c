"""`/tokenize` takes a text or messages, `/detokenize` token ids, and a bad field is named."""

import json
from typing import Any

import pytest

from server.wire.errors import InvalidRequest
from server.wire.tokenize_request import parse_detokenize_request, parse_tokenize_request

HI = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_a_text_or_messages_are_tokenized() -> None:
    assert parse_tokenize_request(body(prompt="hi")).prompt == "hi"
    messages = parse_tokenize_request(body(messages=HI, reasoning_lambda=0.6)).messages
    assert messages is not None
    assert messages[0].text == "hi"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "hi", "messages": HI}, "prompt"),
        ({"prompt": "hi", "reasoning_lambda": 0.6}, "reasoning_lambda"),
        ({"messages": HI, "add_special_tokens": False}, "add_special_tokens"),
        ({"messages": HI, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "tool", "content": "6"}]}, "messages[0].tool_call_id"),
    ],
)
def test_a_bad_field_of_tokenize_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tokenize_request(body(**fields))
    assert caught.value.param == param


def test_token_ids_are_not_negative() -> None:
    assert parse_detokenize_request(body(tokens=[1, 2])).tokens == [1, 2]
    with pytest.raises(InvalidRequest) as caught:
        parse_detokenize_request(body(tokens=[1, -2]))
    assert caught.value.param == "tokens[1]"
