"""A chat request is checked field by field, and a bad field is named."""

from typing import Any

import pytest

from server.wire.chat_request import ChatRequest
from tests.server.chat_bodies import parse, refusal

WITHOUT_EFFECT = [
    name
    for name, it in ChatRequest.model_fields.items()
    if it.description == "Accepted and ignored."
]


def test_the_smallest_request_leaves_sampling_to_the_pair() -> None:
    request = parse()
    assert (request.temperature, request.top_p, request.reasoning_lambda) == (None, None, None)
    assert request.messages[0].text == "hi"


def test_the_five_fields_without_effect_are_accepted() -> None:
    for name in WITHOUT_EFFECT:
        parse(**{name: True if name == "store" else "x"})
    assert len(WITHOUT_EFFECT) == 5


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, True),
        ({"include_reasoning": False}, False),
        ({"reasoning": {"exclude": True}}, False),
        ({"reasoning": {"exclude": True}, "include_reasoning": False}, False),
        ({"reasoning": {"exclude": False}}, True),
    ],
)
def test_reasoning_is_shown_unless_it_is_excluded(fields: dict[str, Any], shown: bool) -> None:
    assert parse(**fields).shows_reasoning is shown


def test_max_completion_tokens_is_the_answer_limit() -> None:
    assert parse(max_completion_tokens=7).answer_limit == 7
    assert parse(max_tokens=8).answer_limit == 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ],
)
def test_a_bad_field_of_chat_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
