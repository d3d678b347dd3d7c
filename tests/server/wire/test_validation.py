"""A body that is no valid request is refused with a short message that names the field."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.wire.chat_request import parse_chat_request
from server.wire.errors import InvalidRequest
from server.wire.openapi import OPERATIONS
from server.wire.wire_model import NOT_IMPLEMENTED, WireModel
from tests.server.chat_bodies import parse, refusal


def test_the_error_of_a_typo_suggests_the_field() -> None:
    error = refusal(reasoning_lamda=0.6)
    assert error.param == "reasoning_lamda"
    assert "did you mean `reasoning_lambda`" in error.message


@pytest.mark.parametrize("name", sorted(NOT_IMPLEMENTED))
def test_a_field_that_is_not_implemented_is_refused_by_name(name: str) -> None:
    error = refusal(**{name: 1})
    assert error.param == name
    assert "not implemented" in error.message


@pytest.mark.parametrize("name", ["tools", "temperature", "stop", "stream_options", "logit_bias"])
def test_null_means_that_a_field_is_absent(name: str) -> None:
    assert parse(**{name: None}) == parse()


def test_an_unknown_field_is_refused_even_as_null() -> None:
    assert refusal(nonsense=None).param == "nonsense"


@pytest.mark.parametrize("name", ["(one)", "()", "(", ""])
def test_an_unknown_field_may_be_named_like_a_union_tag(name: str) -> None:
    error = refusal(**{name: 1})
    assert (error.param, error.message) == (name, f"Unknown field `{name}`")


def union_tags(schema: Any) -> Iterator[str]:
    """Returns the tags of all unions in a core schema of pydantic."""
    if isinstance(schema, dict):
        if schema.get("type") == "tagged-union":
            yield from schema["choices"]
        for part in schema.values():
            yield from union_tags(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from union_tags(part)


BODIES = [operation.body for operation in OPERATIONS if operation.body is not None]


@pytest.mark.parametrize("body", BODIES)
def test_union_tags_are_in_parentheses_so_that_no_error_names_them(body: type[WireModel]) -> None:
    tags = [*union_tags(body.__pydantic_core_schema__)]
    assert tags or body.__name__ == "DetokenizeRequest"
    assert all(tag.startswith("(") and tag.endswith(")") for tag in tags)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert caught.value.param == "model"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nonsense", b'"x"', b"\xff\xfe", b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(body)
    assert caught.value.param is None


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_chat_request(b"[" * 100_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 100_000: 1},
        {"logit_bias": {"y" * 100_000: 1000}},
        {"messages": [{"role": "z" * 100_000, "content": "x"}]},
        {"metadata": {"k" * 100_000: "v"}},
    ],
)
def test_an_error_never_echoes_its_input_at_length(fields: dict[str, Any]) -> None:
    assert len(json.dumps(refusal(**fields).body)) < 2000
