"""A bad response format is refused, and its wrong field is named."""

from typing import Any

import pytest

from tests.server.chat_bodies import json_schema, refusal


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema() | {"type": "text"}}, "response_format.json_schema"),
        ({"response_format": json_schema(name="a b")}, "response_format.json_schema.name"),
        ({"response_format": json_schema(schema=True)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema=None)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schma={})}, "response_format.json_schema.schma"),
    ],
)
def test_a_bad_response_format_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
