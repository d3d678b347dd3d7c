"""Answers follow response formats and tools from an unmodified `openai` client to the real engine.

The embedded pair was not trained on tools or schemas: its answers are nonsense, but valid.
"""

import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from mi_runtime.embedded_pair.tokenizer import build_tokenizer

QUESTION: list[Any] = [{"role": "user", "content": "a=6,b=a-2,c=b+6,d=c-3. d?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": 0, "maximum": 99},
        "why": {"type": "string", "maxLength": 8},
    },
    "required": ["answer", "why"],
    "additionalProperties": False,
}
LAMBDAS = [0.0, 0.6, 1.0]
BUDGET = {"thinking_token_budget": 20}  # with tools in the prompt, the pair would think without end
WHITESPACE = build_tokenizer().encode(" \t\r\n\n\n").ids
NO_WHITESPACE = {str(it): -100 for it in WHITESPACE}  # as the pair may write hundreds in JSON


def tool(name: str, schema: dict[str, Any] = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **fields}}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    extra = BUDGET | fields.pop("extra", {})
    fields = {"temperature": 0, "max_tokens": 400, "logit_bias": NO_WHITESPACE} | fields
    fields = {"model": "pair", "messages": QUESTION} | fields
    return client.chat.completions.create(extra_body=extra, **fields)


def schema_format(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **fields}}


# --- response formats ---


@pytest.mark.parametrize(("value", "temperature"), [(0.0, 1), (0.6, 2), (1.0, 1)])
def test_an_answer_is_an_instance_of_its_schema_and_thinking_is_the_models_choice(
    client: openai.OpenAI, value: float, temperature: float
) -> None:
    answer = ask(
        client,
        response_format=schema_format(SCHEMA, strict=True),
        temperature=temperature,
        n=4,
        seed=1,
        logit_bias={},
        extra={"reasoning_lambda": value, "thinking_token_budget": -1},
    )
    finished = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert finished
    for choice in finished:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    reasoning = [getattr(choice.message, "reasoning", "") for choice in answer.choices]
    # A grammar makes no model open a block: at λ = 0 the answer begins at once.
    assert any("=" in text for text in reasoning) is (value > 0)


def test_a_stream_of_json_adds_up_to_the_plain_answer(client: openai.OpenAI) -> None:
    form = schema_format(SCHEMA)
    plain = ask(client, response_format=form).choices[0].message.content
    chunks = [chunk for chunk in ask(client, response_format=form, stream=True) if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_json_object_is_an_object(client: openai.OpenAI) -> None:
    form = {"type": "json_object"}
    answer = ask(client, response_format=form, temperature=1, n=4, seed=3, logit_bias={})
    finished = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert finished
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in finished)


def test_a_fan_out_follows_the_schema_at_every_lambda(client: openai.OpenAI) -> None:
    answer = ask(client, response_format=schema_format(SCHEMA), extra={"reasoning_lambda": LAMBDAS})
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


class Answer(BaseModel):
    answer: Literal["one", "two"]
    sure: bool
    digits: list[Literal[1, 2]] = Field(max_length=2)


def test_the_clients_parse_returns_an_object_of_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="pair",
        messages=QUESTION,
        response_format=Answer,
        temperature=0,
        logit_bias=NO_WHITESPACE,
        extra_body=BUDGET,
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_an_answer_in_a_format_has_the_logprobs_of_every_token(client: openai.OpenAI) -> None:
    answer = ask(client, response_format=schema_format(SCHEMA), logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    tokens = [entry.token for entry in choice.logprobs.content]
    assert "".join(tokens).endswith(choice.message.content)
    assert len(tokens) == answer.usage.completion_tokens


def test_a_bad_schema_is_openais_bad_request_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format=schema_format({"type": "foo"}))
    assert caught.value.param == "response_format.json_schema.schema"


# --- tools ---


@pytest.mark.parametrize(("value", "temperature"), [(0.0, 1.5), (0.6, 0), (1.0, 1.5)])
def test_a_required_call_is_one_of_the_tools_with_valid_arguments(
    client: openai.OpenAI, value: float, temperature: float
) -> None:
    tools = [tool("look_up"), {"type": "function", "function": {"name": "add"}}]
    answer = ask(
        client,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=temperature,
        seed=4,
        extra={"reasoning_lambda": value},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name in ("look_up", "add")
    schema = SCHEMA if call.function.name == "look_up" else {"maxProperties": 0}
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    tools = [tool("look_up"), tool("add")]
    named = {"type": "function", "function": {"name": "add"}}
    (choice,) = ask(client, tools=tools, tool_choice=named).choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "add"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_a_streamed_call_adds_up_to_the_plain_one(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": [tool("add")], "tool_choice": "required"}
    (plain,) = ask(client, parallel_tool_calls=False, **fields).choices[0].message.tool_calls
    chunks = list(ask(client, parallel_tool_calls=False, stream=True, **fields))
    deltas = [
        call
        for chunk in chunks
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]
    assert (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", "add")
    assert deltas[0].function.arguments == ""
    assert "".join(call.function.arguments for call in deltas) == plain.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_clients_stream_helper_assembles_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="pair",
        messages=QUESTION,
        tools=[tool("add", strict=True)],  # type: ignore[list-item]
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        logit_bias=NO_WHITESPACE,
        extra_body=BUDGET,
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "add"
    jsonschema.validate(call.function.parsed_arguments, SCHEMA)


def test_a_call_and_its_result_can_be_sent_back(client: openai.OpenAI) -> None:
    tools = [tool("add")]
    first = ask(client, tools=tools, tool_choice="required", parallel_tool_calls=False)
    message = first.choices[0].message
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "6"}
    for calling_message in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        second = ask(
            client, messages=[*QUESTION, calling_message, answer], tools=tools, max_tokens=1
        )
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_in_auto_an_answer_without_a_call_is_text(client: openai.OpenAI) -> None:
    for strict in (False, True):
        tools = [tool("add", strict=strict)]
        answer = ask(client, tools=tools, max_tokens=60, extra={"reasoning_lambda": 0.0})
        (choice,) = answer.choices
        assert choice.message.tool_calls is None
        assert choice.message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_bad_tools_are_openais_bad_request_error(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.param == param
