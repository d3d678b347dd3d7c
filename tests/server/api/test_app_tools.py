"""Tools and response formats over the app: what reaches the engine, and what an answer becomes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mi_runtime.embedded_pair.tokenizer import build_tokenizer

MakeClient = Callable[..., TestClient]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


def chat(client: TestClient, content: str, **fields: Any) -> Any:
    body = {"model": "pair", "messages": [{"role": "user", "content": content}]} | fields
    return client.post("/v1/chat/completions", json=body)


def choice(client: TestClient, content: str, **fields: Any) -> dict[str, Any]:
    response = chat(client, content, **fields)
    assert response.status_code == 200, response.text
    (only,) = response.json()["choices"]
    assert isinstance(only, dict)
    return only


def streamed(client: TestClient, content: str, **fields: Any) -> list[dict[str, Any]]:
    """The choice of every chunk."""
    *events, done, _ = chat(client, content, stream=True, **fields).text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]


def grammar(client: TestClient, **fields: Any) -> str | None:
    request: dict[str, Any] = json.loads(choice(client, "request", **fields)["message"]["content"])
    source: str | None = request["grammar"]
    return source


# --- what reaches the engine ---


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
    written = choice(client, 'say {"a": 12}', response_format=schema)["message"]["content"]
    assert written == '{"a": 12}'
    other = choice(client, "say something else", response_format=schema)["message"]["content"]
    assert set(json.loads(other)) == {"a"}


def test_a_required_call_follows_its_grammar_after_the_think_block(client: TestClient) -> None:
    fields = {"tools": [ADD], "tool_choice": "required"}
    for text in (f"<think>so</think>{CALL}", "<think>so</think>no call"):
        answer = choice(client, f"say {text}", **fields)
        assert answer["message"]["reasoning"] == "so"
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
        assert answer["finish_reason"] == "tool_calls"


def test_every_choice_has_the_grammar(client: TestClient) -> None:
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
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"response_format": SCHEMA}, "response_format"), ({"tools": [ADD]}, "tools")],
)
def test_a_spelled_block_that_the_prompt_opens_refuses_grammars(
    make_client: MakeClient, tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    """The engine could not see where the answer begins."""
    text = build_tokenizer().to_str()
    spelled = text.replace('"<think>"', '"<other>"').replace('"</think>"', '"</other>"')
    (tmp_path / "tokenizer.json").write_text(spelled)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    template = "{% if tools %}{% endif %}<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text(template + "<think>\n")
    client = make_client(thinking=str(tmp_path), reasoning_template="thinking")
    choosing = {"tool_choice": "required"} if "tools" in fields else {}
    response = chat(client, "say x", **fields, **choosing)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert choice(client, "say x")["finish_reason"] == "stop"


# --- what an answer becomes ---


def test_a_call_is_a_call_and_content_is_null(client: TestClient) -> None:
    got = choice(client, f"say {CALL}", tools=[ADD])
    assert got["finish_reason"] == "tool_calls"
    assert got["message"]["content"] is None
    (call,) = got["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_content_stands_beside_calls_each_with_an_id_of_its_own(client: TestClient) -> None:
    got = choice(client, f"say Both.\n{CALL}\n{CALL}", tools=[ADD])
    assert got["message"]["content"] == "Both."
    assert len({call["id"] for call in got["message"]["tool_calls"]}) == 2


def test_a_stream_of_a_call_adds_up_to_the_plain_answer(client: TestClient) -> None:
    chunks = streamed(client, f"say So.\n{CALL}\n{CALL}", tools=[ADD])
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
    got = choice(client, f"say {CALL}", **fields)
    assert got["message"] == {"role": "assistant", "content": CALL}
    assert got["finish_reason"] == "stop"


def test_what_is_no_call_stays_content(client: TestClient) -> None:
    text = "<tool_call>{broken}</tool_call>"
    got = choice(client, f"say {text}", tools=[ADD])
    assert got["message"] == {"role": "assistant", "content": text}
    assert got["finish_reason"] == "stop"


def test_an_answer_cut_in_its_call_says_so(client: TestClient) -> None:
    got = choice(client, f"say {CALL}", tools=[ADD], max_tokens=len(CALL) - 18)
    assert got["finish_reason"] == "length"
    (call,) = got["message"]["tool_calls"]
    assert '{"a": 1}'.startswith(call["function"]["arguments"])


def test_a_stop_string_ends_an_answer_before_its_call(client: TestClient) -> None:
    got = choice(client, f"say So. END {CALL}", tools=[ADD], stop="END")
    assert got["message"]["content"] == "So. "
    assert got["finish_reason"] == "stop"


def test_a_call_after_a_block_is_a_call_and_one_inside_it_is_reasoning(
    make_client: MakeClient,
) -> None:
    client = make_client(opening=True)
    got = choice(client, f"say so {CALL}</think>\n\n{CALL}", tools=[ADD], reasoning_lambda=1)
    assert got["message"]["reasoning"] == f"so {CALL}"
    assert len(got["message"]["tool_calls"]) == 1
    assert got["finish_reason"] == "tool_calls"


def test_a_call_in_a_block_that_never_closed_is_a_call(make_client: MakeClient) -> None:
    """The block turned out to be the answer; so did the call in it."""
    client = make_client(opening=True)
    fields: dict[str, Any] = {"tools": [ADD], "reasoning_lambda": 1}
    got = choice(client, f"say so\n{CALL}", **fields)
    assert got["message"]["content"] == "so"
    assert len(got["message"]["tool_calls"]) == 1
    last = streamed(client, f"say so\n{CALL}", **fields)[-1]
    assert last["finish_reason"] == "tool_calls"


def test_logprobs_of_a_call_are_all_there(client: TestClient) -> None:
    plain = choice(client, f"say {CALL}", tools=[ADD], logprobs=True)
    chunks = streamed(client, f"say {CALL}", tools=[ADD], logprobs=True)
    entries = [entry for it in chunks for entry in (it["logprobs"] or {}).get("content", [])]
    assert entries == plain["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith(CALL)


def test_a_stop_string_inside_a_call_does_not_make_it_one(client: TestClient) -> None:
    cut = choice(client, f"say {CALL}", tools=[ADD], stop='"a"')
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields", [{"response_format": SCHEMA}, {"tools": [ADD], "tool_choice": "required"}]
)
def test_a_constrained_answer_does_not_continue_a_message(
    client: TestClient, fields: dict[str, Any]
) -> None:
    begun = [{"role": "user", "content": "say x"}, {"role": "assistant", "content": '{"d": '}]
    refused = chat(client, "", messages=begun, continue_final_message=True, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "continue_final_message"
