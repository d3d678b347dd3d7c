"""λ, budget and effort are refused in any unknown form, and the wrong part is named."""

from typing import Any

import pytest

from server.wire.chat_request import parse_chat_request
from server.wire.errors import InvalidRequest
from tests.server.chat_bodies import refusal


@pytest.mark.parametrize(
    ("value", "at"),
    [
        ("0.6", ""),
        (True, ""),
        ([], ""),
        ([0.5] * 129, ""),
        ([0.6, "0.6"], "[1]"),
        ([[0.6]], "[0]"),
        ({"attn": "0.6"}, ".attn"),
        ({"default": True}, ".default"),
        ({"atn": 0.6}, ".atn"),
        ({"layers": 0.5}, ".layers"),
        ({"layers": {"0-3": "x"}}, ".layers.0-3"),
        ({"layers": {"0-3": [1]}}, ".layers.0-3"),
        ({"layers": {"0-3": {"embed": 1}}}, ".layers.0-3.embed"),
        ({"layers": {"0-3": {"attn": []}}}, ".layers.0-3.attn"),
    ],
)
def test_a_lambda_in_no_known_form_is_refused_where_it_is_wrong(value: object, at: str) -> None:
    assert refusal(reasoning_lambda=value).param == f"reasoning_lambda{at}"


def test_the_error_of_a_typo_in_a_group_suggests_the_field() -> None:
    assert "did you mean `attn`" in refusal(reasoning_lambda={"atn": 0.6}).message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_lambda_that_is_not_finite_is_refused(text: str) -> None:
    body = '{"model":"pair","messages":[{"role":"user","content":"x"}],"reasoning_lambda":%s}'
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request((body % text).encode())
    assert caught.value.param == "reasoning_lambda"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_token_budget": 1.5}, "thinking_token_budget"),
        ({"thinking_token_budget": 2**31}, "thinking_token_budget"),
        ({"thinking_budget": "9"}, "thinking_budget"),
        ({"thinking": {"type": "enabled", "budget_tokens": -2}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"budget_tokens": 5}}, "thinking.type"),
        ({"thinking": True}, "thinking"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"reasoning_effort": 1.01}, "reasoning_effort"),
        ({"reasoning_effort": True}, "reasoning_effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": "most"}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": -2}}, "reasoning.max_tokens"),
        ({"reasoning": {"exclude": "yes"}}, "reasoning.exclude"),
        ({"reasoning": {"exclude": True}, "include_reasoning": True}, "reasoning.exclude"),
        ({"reasoning": {"exclude": False}, "include_reasoning": False}, "reasoning.exclude"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"),
        ({"routing_class": ""}, "routing_class"),
        ({"routing_class": "x" * 65}, "routing_class"),
        ({"answer_lambda": "x"}, "answer_lambda"),
        ({"answer_lambda": {"default": 1}}, "answer_lambda"),
    ],
)
def test_a_bad_budget_or_answer_lambda_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
