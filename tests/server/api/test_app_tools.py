"""Tools and response formats reach the engine as grammars, and calls are read from the answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mi_runtime.embedded_pair.tokenizer import build_tokenizer
from tests.server.chat_requests import MakeClient, answer_to, chat, check_error, stream_events
from tests.server.tag_tokens import without_think_tokens

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


def only_choice(client: TestClient, content: str, **fields: Any) -> dict[str, Any]:
    (choice,) = answer_to(client, content, **fields)["choices"]
    assert isinstance(choice, dict)
    return choice


def streamed_choices(client: TestClient, content: str, **fields: Any) -> list[dict[str, Any]]:
    """Returns the choice of every chunk of a stream."""
    return [event["choices"][0] for event in stream_events(client, content, **fields)]


def grammar(client: TestClient, **fields: Any) -> str | None:
    """Returns the grammar that reaches the engine."""
    request: dict[str, Any] = json.loads(
        only_choice(client, "request", **fields)["message"]["content"]
    )
    source: str | None = request["grammar"]
    return source


# --- grammars ---


def test_a_format_reaches_the_engine_as_a_grammar(client: TestClient) -> None:
    assert grammar(client) is None
    assert grammar(client, response_format={"type": "text"}) is None
    assert '{"type":"object"' in (grammar(client, response_format=SCHEMA) or "")


def test_a_required_call_reaches_the_engine_as_a_grammar(client: TestClient) -> None:
    assert grammar(client, tools=[ADD]) is None
    assert "add" in (grammar(client, tools=[ADD], tool_choice="required") or "")


def test_an_answer_follows_its_grammar_whatever_its_script_writes(client: TestClient) -> None:
    arguments = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": arguments}}
    written = only_choice(client, 'say {"a": 12}', response_format=schema)["message"]["content"]
    assert written == '{"a": 12}'
    other = only_choice(client, "say something else", response_format=schema)["message"]["content"]
    assert set(json.loads(other)) == {"a"}


def test_a_required_call_follows_its_grammar_after_the_think_block(client: TestClient) -> None:
    fields = {"tools": [ADD], "tool_choice": "required"}
    for text in (f"<think>so</think>{CALL}", "<think>so</think>no call"):
        answer = only_choice(client, f"say {text}", **fields)
        assert answer["message"]["reasoning"] == "so"
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
        assert answer["finish_reason"] == "tool_calls"


def test_every_choice_has_the_same_grammar(client: TestClient) -> None:
    for fields in ({"n": 3}, {"reasoning_lambda": [0, 0.6, 1]}):
        answer = chat(client, "request", response_format=SCHEMA, **fields).json()
        requests = [json.loads(it["message"]["content"]) for it in answer["choices"]]
        assert len({it["grammar"] for it in requests}) == 1
        assert requests[0]["grammar"] is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": SCHEMA | {"json_schema": {"name": "a", "schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": 1}}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_a_bad_schema_is_refused_before_the_engine(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        response = chat(client, "say x", stream=stream, **fields)
        check_error(response, 400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"response_format": SCHEMA}, "response_format"), ({"tools": [ADD]}, "tools")],
)
def test_grammars_are_refused_if_the_prompt_opens_a_block_without_tag_tokens(
    make_client: MakeClient, tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    """The engine could not find where the answer begins."""
    (tmp_path / "tokenizer.json").write_text(without_think_tokens(build_tokenizer().to_str()))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    template = "{% if tools %}{% endif %}<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text(template + "<think>\n")
    client = make_client(thinking=str(tmp_path), reasoning_template="thinking")
    choosing = {"tool_choice": "required"} if "tools" in fields else {}
    response = chat(client, "say x", **fields, **choosing)
    check_error(response, 400, "invalid_request_error", param)
    assert only_choice(client, "say x")["finish_reason"] == "stop"


# --- answers ---


def test_an_answer_of_one_call_has_the_call_and_null_content(client: TestClient) -> None:
    got = only_choice(client, f"say {CALL}", tools=[ADD])
    assert got["finish_reason"] == "tool_calls"
    assert got["message"]["content"] is None
    (call,) = got["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_an_answer_may_have_content_and_calls_each_with_its_own_id(client: TestClient) -> None:
    got = only_choice(client, f"say Both.\n{CALL}\n{CALL}", tools=[ADD])
    assert got["message"]["content"] == "Both."
    assert len({call["id"] for call in got["message"]["tool_calls"]}) == 2


def test_a_stream_of_a_call_adds_up_to_the_plain_answer(client: TestClient) -> None:
    chunks = streamed_choices(client, f"say So.\n{CALL}\n{CALL}", tools=[ADD])
    deltas = [call for it in chunks for call in it["delta"].get("tool_calls", [])]
    heads = [call for call in deltas if "id" in call]
    assert [(it["index"], it["type"], it["function"]) for it in heads] == [
        (0, "function", {"name": "add", "arguments": ""}),
        (1, "function", {"name": "add", "arguments": ""}),
    ]
    for index in (0, 1):
        own = [call for call in deltas if call["index"] == index]
        assert own[0] == heads[index]
        assert len(own) > 3
        assert "".join(call["function"]["arguments"] for call in own) == '{"a": 1}'
    assert "".join(it["delta"].get("content", "") for it in chunks) == "So."
    assert chunks[-1]["finish_reason"] == "tool_calls"
    assert {it["finish_reason"] for it in chunks[:-1]} == {None}


@pytest.mark.parametrize("fields", [{}, {"tools": [ADD], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(client: TestClient, fields: dict[str, Any]) -> None:
    got = only_choice(client, f"say {CALL}", **fields)
    assert got["message"] == {"role": "assistant", "content": CALL}
    assert got["finish_reason"] == "stop"


def test_text_that_is_no_call_stays_content(client: TestClient) -> None:
    text = "<tool_call>{broken}</tool_call>"
    got = only_choice(client, f"say {text}", tools=[ADD])
    assert got["message"] == {"role": "assistant", "content": text}
    assert got["finish_reason"] == "stop"


def test_an_answer_cut_inside_its_call_finishes_by_length(client: TestClient) -> None:
    got = only_choice(client, f"say {CALL}", tools=[ADD], max_tokens=len(CALL) - 18)
    assert got["finish_reason"] == "length"
    (call,) = got["message"]["tool_calls"]
    assert '{"a": 1}'.startswith(call["function"]["arguments"])


def test_a_stop_string_ends_an_answer_before_its_call(client: TestClient) -> None:
    got = only_choice(client, f"say So. END {CALL}", tools=[ADD], stop="END")
    assert got["message"]["content"] == "So. "
    assert got["finish_reason"] == "stop"


def test_a_call_after_a_block_is_a_call_and_one_inside_it_is_reasoning(
    make_client: MakeClient,
) -> None:
    client = make_client(opening=True)
    got = only_choice(client, f"say so {CALL}</think>\n\n{CALL}", tools=[ADD], reasoning_lambda=1)
    assert got["message"]["reasoning"] == f"so {CALL}"
    assert len(got["message"]["tool_calls"]) == 1
    assert got["finish_reason"] == "tool_calls"


def test_a_call_in_a_block_that_never_closed_is_a_call(make_client: MakeClient) -> None:
    """The block becomes the answer, and so the call in it becomes a call of the answer."""
    client = make_client(opening=True)
    fields: dict[str, Any] = {"tools": [ADD], "reasoning_lambda": 1}
    got = only_choice(client, f"say so\n{CALL}", **fields)
    assert got["message"]["content"] == "so"
    assert len(got["message"]["tool_calls"]) == 1
    last = streamed_choices(client, f"say so\n{CALL}", **fields)[-1]
    assert last["finish_reason"] == "tool_calls"


def test_a_call_has_the_logprobs_of_all_its_tokens(client: TestClient) -> None:
    plain = only_choice(client, f"say {CALL}", tools=[ADD], logprobs=True)
    chunks = streamed_choices(client, f"say {CALL}", tools=[ADD], logprobs=True)
    entries = [entry for it in chunks for entry in (it["logprobs"] or {}).get("content", [])]
    assert entries == plain["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith(CALL)


def test_a_stop_string_inside_a_call_leaves_no_call(client: TestClient) -> None:
    cut = only_choice(client, f"say {CALL}", tools=[ADD], stop='"a"')
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields", [{"response_format": SCHEMA}, {"tools": [ADD], "tool_choice": "required"}]
)
def test_a_constrained_answer_does_not_continue_a_message(
    client: TestClient, fields: dict[str, Any]
) -> None:
    begun = [{"role": "user", "content": "say x"}, {"role": "assistant", "content": '{"d": '}]
    refused = chat(client, "", messages=begun, continue_final_message=True, **fields)
    check_error(refused, 400, "invalid_request_error", "continue_final_message")
