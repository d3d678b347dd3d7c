import json
from typing import Any

import pytest

from server.wire.errors import InvalidRequest
from server.wire.requests import (
    ACCEPTED_WITHOUT_EFFECT,
    NOT_IMPLEMENTED,
    ChatRequest,
    parse_chat_request,
)


def parse(**fields: Any) -> ChatRequest:
    base = {"model": "pair", "messages": [{"role": "user", "content": "hi"}]}
    return parse_chat_request(json.dumps(base | fields).encode())


USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {}} | fields}


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert len(caught.value.message) <= 500
    return caught.value


def test_the_smallest_request_leaves_sampling_to_the_pair() -> None:
    request = parse()
    assert (request.temperature, request.top_p, request.reasoning_lambda) == (None, None, None)
    assert request.messages[0].text == "hi"


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


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


def test_a_typo_in_a_group_is_told_with_what_was_meant() -> None:
    assert "did you mean `attn`" in refusal(reasoning_lambda={"atn": 0.6}).message


@pytest.mark.parametrize("n", [{}, {"n": None}, {"n": 3}])
def test_a_list_of_lambdas_is_a_choice_for_each(n: dict[str, Any]) -> None:
    assert parse(reasoning_lambda=[0, 0.6, 1], **n).choices == 3


def test_a_list_of_lambdas_with_another_n_is_refused() -> None:
    error = refusal(reasoning_lambda=[0, 0.6, 1], n=2)
    assert error.param == "n"
    assert "lists 3 values and `n` is 2" in error.message


# --- budgets ---


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


# --- tools ---


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_that_called_tools_needs_no_content(content: dict[str, Any]) -> None:
    message = parse(messages=[CALLING | content]).messages[0]
    assert message.text == ""
    assert message.tool_calls[0].function.name == "f"


def test_a_tools_message_says_which_call_it_answers() -> None:
    answer = {"role": "tool", "tool_call_id": "c", "content": "6"}
    assert parse(messages=[USER, CALLING, answer]).messages[2].tool_call_id == "c"


@pytest.mark.parametrize("choice", [None, "auto", "required", named("f")])
def test_tools_are_offered_unless_none_is_to_be_called(choice: Any) -> None:
    assert [it.name for it in parse(tools=[tool("f")], tool_choice=choice).offered_tools] == ["f"]
    assert parse(tools=[tool("f")], tool_choice="none").offered_tools == []
    assert parse().offered_tools == []


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"parallel_tool_calls": False}])
def test_what_is_true_without_tools_may_be_said_without_them(fields: dict[str, Any]) -> None:
    parse(**fields)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_lambda_that_is_not_finite_is_refused(text: str) -> None:
    body = '{"model":"pair","messages":[{"role":"user","content":"x"}],"reasoning_lambda":%s}'
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request((body % text).encode())
    assert caught.value.param == "reasoning_lambda"


def test_a_typo_is_told_with_what_was_meant() -> None:
    error = refusal(reasoning_lamda=0.6)
    assert error.param == "reasoning_lamda"
    assert "did you mean `reasoning_lambda`" in error.message


@pytest.mark.parametrize("name", sorted(NOT_IMPLEMENTED))
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    error = refusal(**{name: 1})
    assert error.param == name
    assert "not implemented" in error.message


@pytest.mark.parametrize("name", ["tools", "temperature", "stop", "stream_options", "logit_bias"])
def test_null_means_not_given(name: str) -> None:
    assert parse(**{name: None}) == parse()


def test_an_unknown_field_is_refused_even_as_null() -> None:
    assert refusal(nonsense=None).param == "nonsense"


@pytest.mark.parametrize("name", [it for it in ACCEPTED_WITHOUT_EFFECT if "." not in it])
def test_the_fields_without_effect_are_accepted(name: str) -> None:
    parse(**{name: True if name == "store" else "x"})


def test_obfuscation_is_accepted_in_stream_options() -> None:
    parse(stream=True, stream_options={"include_obfuscation": False, "include_usage": True})


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
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty"),  # was a 500: logits became infinite
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema() | {"type": "text"}}, "response_format.json_schema"),
        ({"response_format": json_schema(name="a b")}, "response_format.json_schema.name"),
        ({"response_format": json_schema(schema=True)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema=None)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schma={})}, "response_format.json_schema.schma"),
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
        ({"tool_choice": named("f")}, "tool_choice.function.name"),
        ({"tool_choice": named("g"), "tools": [tool("f")]}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [tool("f")]}, "tool_choice.type"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


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


def test_one_stop_string_is_a_list_of_one() -> None:
    assert parse(stop="END").stop_strings == ["END"]


def test_max_completion_tokens_is_the_answer_limit() -> None:
    assert parse(max_completion_tokens=7).answer_limit == 7
    assert parse(max_tokens=8).answer_limit == 8
