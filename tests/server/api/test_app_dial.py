"""Over HTTP, λ by group, a fan-out, the answer's λ and the cap on reasoning reach the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mi_runtime.embedded_pair.tokenizer import build_tokenizer
from server.ops import logs
from tests.server.chat_requests import MakeClient, answer_to, chat, check_error, stream_events
from tests.server.tag_tokens import without_think_tokens

UNMEASURED = {"profile": "neutral", "routing_class": "default"}


def engine_requests(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """Returns the request of each choice as it reached the engine."""
    answer = answer_to(client, "request", **fields)
    return [json.loads(choice["message"]["content"]) for choice in answer["choices"]]


# --- λ by group ---


def test_an_object_reaches_the_engine_group_by_group(client: TestClient) -> None:
    value = {"default": 0.6, "head": 0, "layers": {"0-1": {"attn": 1}}}
    (got,) = engine_requests(client, reasoning_lambda=value)
    assert got["dial"] == [0.6, {"0.attn": 1.0, "1.attn": 1.0, "head": 0.0}]


def test_an_object_is_reported_in_its_canonical_form(client: TestClient) -> None:
    value = {"default": 0.6, "mlp": 0.6, "layers": {"0": 0.2, "1": 0.2}}
    response = chat(client, "say x", reasoning_lambda=value)
    reported = {"default": 0.6, "layers": {"0-1": 0.2}}
    assert (
        response.json()["routing"] == {"reasoning_lambda": reported, "source": "body"} | UNMEASURED
    )
    assert response.headers["X-Reasoning-Lambda"] == "0.6"
    assert "reasoning_lambda" not in response.json()["choices"][0]


def test_the_default_of_an_object_selects_the_template_and_the_metrics_bucket(
    make_client: MakeClient,
) -> None:
    client = make_client(opening=True)
    text = "say a</think>b"
    instruct = answer_to(client, text, reasoning_lambda={"default": 0, "mlp": 1})
    thinking = answer_to(client, text, reasoning_lambda={"default": 0.6, "mlp": 0})
    assert instruct["choices"][0]["message"]["content"] == "a</think>b"
    assert thinking["choices"][0]["message"]["content"] == "b"
    counted = 'mi_request_prompt_tokens_count{lambda_bucket="0.6-0.7",model_name="pair"} 1.0'
    assert counted in client.get("/metrics").text


# --- fan-out ---


def test_a_fan_out_is_one_choice_for_each_lambda_in_order(client: TestClient) -> None:
    response = chat(client, "lambda", reasoning_lambda=[1, 0.2, 0.6])
    answer = response.json()
    assert [it["message"]["content"] for it in answer["choices"]] == ["1", "0.2", "0.6"]
    assert [it["reasoning_lambda"] for it in answer["choices"]] == [1.0, 0.2, 0.6]
    assert [it["index"] for it in answer["choices"]] == [0, 1, 2]
    reported = {"reasoning_lambda": [1.0, 0.2, 0.6], "source": "body"}
    assert answer["routing"] == reported | UNMEASURED
    assert response.headers["X-Reasoning-Lambda"] == "1,0.2,0.6"


def test_each_choice_of_a_fan_out_is_the_same_as_a_request_of_its_own(
    make_client: MakeClient,
) -> None:
    client = make_client(opening=True)
    fields: dict[str, Any] = {"seed": 5, "thinking_budget": 900, "answer_lambda": 0.2, "n": None}
    lambdas = [0, 0.6, 0.2]
    together = engine_requests(client, reasoning_lambda=lambdas, **fields)
    alone = [engine_requests(client, reasoning_lambda=value, **fields)[0] for value in lambdas]
    assert together == alone
    assert together[0]["prompt"] != together[1]["prompt"]  # each has its own template


def test_the_longest_prompt_of_a_fan_out_is_counted_once(make_client: MakeClient) -> None:
    client = make_client(opening=True)
    short, long = (answer_to(client, "say x", reasoning_lambda=it)["usage"] for it in (0, 1))
    both = answer_to(client, "say x", reasoning_lambda=[1, 0])["usage"]
    assert short["prompt_tokens"] < long["prompt_tokens"] == both["prompt_tokens"]


def test_in_a_stream_the_first_and_last_chunk_of_a_choice_have_its_lambda(
    client: TestClient,
) -> None:
    events = stream_events(client, "say xy", reasoning_lambda=[0.2, 1])
    for index, value in enumerate([0.2, 1.0]):
        own = [it["choices"][0] for it in events if it["choices"][0]["index"] == index]
        assert [it.get("reasoning_lambda") for it in own] == [value, None, None, value]


# --- the answer's λ ---


def test_an_answer_lambda_reaches_the_engine_and_is_reported(client: TestClient) -> None:
    (got,) = engine_requests(client, reasoning_lambda=0.6, answer_lambda=0.2)
    assert got["answer"] == [0.2, {}]
    answer = answer_to(client, "say x", reasoning_lambda=0.6, answer_lambda=0.2)
    reported = {"reasoning_lambda": 0.6, "answer_lambda": 0.2, "source": "body"}
    assert answer["routing"] == reported | UNMEASURED


def test_an_answer_lambda_equal_to_the_dial_is_dropped(client: TestClient) -> None:
    (got,) = engine_requests(client, reasoning_lambda=0.6, answer_lambda=0.6)
    assert got["answer"] is None
    (got,) = engine_requests(
        client, reasoning_lambda={"default": 0.6, "head": 0}, answer_lambda=0.6
    )
    assert got["answer"] == [0.6, {}]


# --- the cap ---


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_token_budget": 100},
        {"thinking_budget": 100},
        {"thinking": {"type": "enabled", "budget_tokens": 100}},
    ],
)
def test_a_budget_under_any_name_becomes_the_engines_cap(
    client: TestClient, fields: dict[str, Any]
) -> None:
    (got,) = engine_requests(client, **fields)
    cap, window, closing = got["think"]
    assert (cap, window) == (100, 10)
    assert build_tokenizer().decode(closing) == "\n</think>\n\n"
    assert answer_to(client, "say x", **fields)["routing"]["cap"] == 100


def test_a_budget_of_minus_one_is_no_budget(client: TestClient) -> None:
    (got,) = engine_requests(client, thinking_token_budget=-1)
    assert got["think"][:2] == [None, 0]
    assert "cap" not in answer_to(client, "say x", thinking_token_budget=-1)["routing"]


@pytest.mark.parametrize("cap", [0, 1, 5])
def test_a_block_that_is_closed_by_force_ends_exactly_at_the_cap(
    make_client: MakeClient, cap: int
) -> None:
    client = make_client(opening=True)
    answer = answer_to(client, "say abcdefgh", reasoning_lambda=1, thinking_token_budget=cap)
    message = answer["choices"][0]["message"]
    assert message.get("reasoning", "") == "abcdefgh"[:cap]
    assert message["content"] == "abcdefgh"[cap:]
    assert answer["routing"]["forced_close"] is True
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": cap}


def test_a_stream_reports_a_forced_close_only_at_its_end(make_client: MakeClient) -> None:
    client = make_client(opening=True)
    fields = {"reasoning_lambda": 1, "thinking_token_budget": 3}
    events = stream_events(client, "say abcd", stream_options={"include_usage": True}, **fields)
    reported = [it["routing"].get("forced_close") for it in events if "routing" in it]
    assert reported == [None, True, True]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(it.get("reasoning", "") for it in deltas) == "abc"
    assert "".join(it.get("content", "") for it in deltas) == "d"


def test_a_block_that_ends_before_the_cap_is_not_closed_by_force(client: TestClient) -> None:
    answer = answer_to(client, "say <think>ab</think>c", thinking_token_budget=20)
    reported = {"reasoning_lambda": 0.8, "source": "budget", "cap": 20}
    assert answer["routing"] == reported | UNMEASURED


def test_a_cap_does_not_apply_to_tags_inside_the_answer(client: TestClient) -> None:
    text = "Write <think> and then think a lot about it."
    answer = answer_to(client, f"say {text}", thinking_token_budget=2)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert "forced_close" not in answer["routing"]


def test_a_block_closes_at_a_line_or_sentence_end_inside_the_soft_window(
    make_client: MakeClient,
) -> None:
    client = make_client(opening=True, think_soft_window=4)
    fields: dict[str, Any] = {"reasoning_lambda": 1, "thinking_token_budget": 6}
    message = answer_to(client, "say ab.c.defg", **fields)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("ab.", "c.defg")
    message = answer_to(client, "say a.bcdefg", **fields)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("a.", "bcdefg")
    message = answer_to(client, "say abcdefgh", **fields)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("abcdef", "gh")


def test_the_operator_sets_the_closing_sequence(make_client: MakeClient) -> None:
    client = make_client(opening=True, think_closing="\nTime is up.\n</think>\n\nSo: ")
    answer = answer_to(client, "say abcd", reasoning_lambda=1, thinking_token_budget=2)
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("ab\nTime is up.", "So: cd")


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_lambda": {"attn": 0.5}}, "reasoning_lambda.default"),
        ({"reasoning_lambda": {"default": 2}}, "reasoning_lambda.default"),
        (
            {"reasoning_lambda": {"default": 0, "layers": {"0-4": 1}}},
            "reasoning_lambda.layers.0-4",
        ),
        (
            {"reasoning_lambda": {"default": 0, "layers": {"0-2": 1, "2": 1}}},
            "reasoning_lambda.layers.2",
        ),
        (
            {"reasoning_lambda": {"default": 0.5, "mlp": 1}, "model": "pair@0.5"},
            "reasoning_lambda",
        ),
        ({"reasoning_lambda": []}, "reasoning_lambda"),
        ({"reasoning_lambda": [0.5, 2]}, "reasoning_lambda[1]"),
        ({"reasoning_lambda": [0.5, {"default": 1}]}, "reasoning_lambda[1]"),
        ({"reasoning_lambda": [0.5, 1], "n": 3}, "n"),
        (
            {"reasoning_lambda": [0.5, 1], "headers": {"X-Reasoning-Lambda": "0.5"}},
            "reasoning_lambda",
        ),
        ({"headers": {"X-Reasoning-Lambda": "0.5,1"}}, "X-Reasoning-Lambda"),
        ({"answer_lambda": -0.1}, "answer_lambda"),
        ({"answer_lambda": [0.5]}, "answer_lambda"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_budget": 5, "thinking_token_budget": 6}, "thinking_budget"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ],
)
def test_a_bad_dial_names_its_field(client: TestClient, fields: dict[str, Any], param: str) -> None:
    check_error(chat(client, "say x", **fields), 400, "invalid_request_error", param)


@pytest.mark.parametrize("field", ["answer_lambda", "thinking_token_budget", "thinking_budget"])
def test_without_tags_that_are_tokens_think_fields_are_refused(
    make_client: MakeClient, untagged: Path, field: str
) -> None:
    client = make_client(thinking=str(untagged))
    response = chat(client, "say x", **{field: 1})
    check_error(response, 400, "invalid_request_error", field)
    assert "single tokens" in response.json()["error"]["message"]
    assert chat(client, "say x", thinking_budget=-1).status_code == 200


@pytest.fixture(scope="module")
def untagged(instruct_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an endpoint in whose vocabulary the think tags are no tokens."""
    directory = tmp_path_factory.mktemp("untagged")
    for file in instruct_directory.iterdir():
        text = file.read_text()
        if file.name == "tokenizer.json":
            text = without_think_tokens(text)
        (directory / file.name).write_text(text)
    return directory


def test_the_log_line_of_a_request_has_its_cap(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(opening=True)
    with caplog.at_level("INFO", "server.ops.request_log"):
        answer_to(client, "say abcd", reasoning_lambda=1, answer_lambda=0.5, thinking_budget=2)
    record = next(it for it in caplog.records if it.name == "server.ops.request_log")
    line = logs.formatter("text").format(record)
    for part in ("lambda=1", "answer_lambda=0.5", "cap=2", "forced_close=1"):
        assert f" {part} " in line
