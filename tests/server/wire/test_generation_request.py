"""The fields that chat and completions share are checked, and a bad one is named."""

from typing import Any

import pytest

from tests.server.chat_bodies import parse, refusal


@pytest.mark.parametrize("n", [{}, {"n": None}, {"n": 3}])
def test_a_list_of_lambdas_makes_a_choice_for_each(n: dict[str, Any]) -> None:
    assert parse(reasoning_lambda=[0, 0.6, 1], **n).choices == 3


def test_a_list_of_lambdas_with_another_n_is_refused() -> None:
    error = refusal(reasoning_lambda=[0, 0.6, 1], n=2)
    assert error.param == "n"
    assert "has 3 values, but `n` is 2" in error.message


def test_include_obfuscation_is_accepted_without_effect() -> None:
    parse(stream=True, stream_options={"include_obfuscation": False, "include_usage": True})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert parse(stop="END").stop_strings == ["END"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty"),  # was a 500: logits became infinite
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_a_bad_field_of_any_request_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
