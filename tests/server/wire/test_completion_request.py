"""A completion request takes prompts as text or token ids, and a bad field is named."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from server.wire.completion_request import CompletionRequest, parse_completion_request
from server.wire.errors import InvalidRequest


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"model": "pair", "prompt": "hi"} | fields).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_one_or_many_of_text_or_token_ids(
    prompt: Any, prompts: Sequence[str | Sequence[int]]
) -> None:
    assert parse(prompt=prompt).prompts == prompts


def test_prompt_logprobs_are_requested_by_echo_with_logprobs() -> None:
    assert parse(logprobs=3).alternatives == 3
    assert parse(logprobs=3).prompt_alternatives is None
    assert parse(logprobs=3, echo=True).prompt_alternatives == 3
    assert parse(echo=True).prompt_alternatives is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"reasoning": {"exclude": True}}, "reasoning.exclude"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.param == param
