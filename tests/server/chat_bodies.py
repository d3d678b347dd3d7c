"""Builds the bodies of chat requests, and parses them."""

import json
from typing import Any

import pytest

from server.wire.chat_request import ChatRequest, parse_chat_request
from server.wire.errors import InvalidRequest

USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}


def parse(**fields: Any) -> ChatRequest:
    """Returns the request of one message with these fields. Raises InvalidRequest."""
    base = {"model": "pair", "messages": [{"role": "user", "content": "hi"}]}
    return parse_chat_request(json.dumps(base | fields).encode())


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named_function(name: str) -> dict[str, Any]:
    """Returns the tool choice that demands a call of this function."""
    return {"type": "function", "function": {"name": name}}


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {}} | fields}


def refusal(**fields: Any) -> InvalidRequest:
    """Returns the error that parsing a request with these fields raises."""
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert len(caught.value.message) <= 500
    return caught.value
