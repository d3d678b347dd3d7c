"""The chat endpoint answers, streams and refuses as OpenAI's does, and reports what it did."""

import asyncio
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import server
from server.api import chat as api_chat
from server.ops import logs
from server.wire.chat_request import ChatRequest, parse_chat_request
from tests.server.chat_requests import (
    MakeClient,
    WaitUntil,
    answer_to,
    chat,
    check_error,
    metric,
    stream_events,
)


def message(client: TestClient, content: str, **fields: Any) -> dict[str, Any]:
    """Returns the message of an answer, with its finish reason."""
    choice = answer_to(client, content, **fields)["choices"][0]
    return {**choice["message"], "finish_reason": choice["finish_reason"]}


def joined(events: list[dict[str, Any]], key: str, index: int = 0) -> str:
    """Returns the text of a field of all deltas of a choice."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(it["delta"].get(key, "") for it in choices if it["index"] == index)


# --- answers ---


def test_an_answer_has_openais_shape(client: TestClient) -> None:
    answer = answer_to(client, "say hello")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "pair"
    assert answer["system_fingerprint"] == "fp_0123456789abcdef"
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello"},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


REASONED = "say <think>\na=6\n</think>\n\nAnswer: 6"


def test_reasoning_is_in_the_message_under_both_its_names(client: TestClient) -> None:
    answer = answer_to(client, REASONED)
    got = answer["choices"][0]["message"]
    assert got["content"] == "Answer: 6"
    assert got["reasoning_content"] == got["reasoning"] == "a=6"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


def test_a_stream_has_the_text_of_the_plain_answer(client: TestClient) -> None:
    plain = message(client, REASONED)
    events = stream_events(client, REASONED)
    assert joined(events, "content") == plain["content"]
    assert joined(events, "reasoning") == joined(events, "reasoning_content") == "a=6"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[0]["routing"] == events[-1]["routing"]


def test_a_stream_with_usage_ends_with_the_plain_answers_usage(make_client: MakeClient) -> None:
    client = make_client()
    events = stream_events(client, REASONED, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    usage = answer_to(client, REASONED)["usage"]
    cached = usage.pop("prompt_tokens_details")["cached_tokens"]
    assert 0 < cached < usage["prompt_tokens"]  # the second answer finds the first one's prompt
    assert events[-1]["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_reasoning_can_be_left_out(client: TestClient) -> None:
    assert "reasoning" not in message(client, REASONED, include_reasoning=False)
    assert joined(stream_events(client, REASONED, include_reasoning=False), "reasoning") == ""


def test_a_block_that_the_prompt_opened_is_reasoning(make_client: MakeClient) -> None:
    client = make_client(opening=True)
    got = message(client, "say a=6\n</think>\n\nAnswer: 6", reasoning_lambda=1)
    assert (got["reasoning"], got["content"]) == ("a=6", "Answer: 6")


def test_an_answer_that_never_closes_the_prompts_block_becomes_content(
    make_client: MakeClient,
) -> None:
    client = make_client(opening=True)
    answer = answer_to(client, "say Answer: 6", reasoning_lambda=1)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Answer: 6"}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    events = stream_events(client, "say Answer: 6", reasoning_lambda=1)
    assert joined(events, "reasoning") == "Answer: 6"
    assert events[-1]["choices"][0]["delta"] == {"content": "Answer: 6"}


def test_a_block_cut_by_length_is_reasoning(make_client: MakeClient) -> None:
    client = make_client(opening=True)
    got = message(client, "forever", reasoning_lambda=1, max_tokens=5)
    assert (got["reasoning"], got["content"]) == ("aaaaa", "")
    assert got["finish_reason"] == "length"


def test_the_instruct_template_opens_no_block_at_lambda_zero(make_client: MakeClient) -> None:
    got = message(make_client(opening=True), "say 6", reasoning_lambda=0)
    assert (got["content"], "reasoning" in got) == ("6", False)


def test_an_answer_ends_before_its_stop_string(client: TestClient) -> None:
    text = "say one two three"
    answer = answer_to(client, text, stop=[" t", "zzz"])
    assert answer["choices"][0]["message"]["content"] == "one"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (
        answer["usage"]["completion_tokens"] < answer_to(client, text)["usage"]["completion_tokens"]
    )
    assert joined(stream_events(client, text, stop=" t"), "content") == "one"


def test_a_stop_string_ends_the_request_in_the_engine(
    client: TestClient, wait_until: WaitUntil
) -> None:
    assert message(client, "forever", stop="aaa")["content"] == ""
    wait_until(lambda: metric(client, "mi_num_requests_running") == 0)


def test_a_stop_string_inside_reasoning_does_not_end_the_answer(client: TestClient) -> None:
    got = message(client, "say <think>a\n\nb</think>c\n\nd", stop="\n\n")
    assert (got["reasoning"], got["content"]) == ("a\n\nb", "c")


def test_n_choices_have_indices_and_seeds_of_their_own(client: TestClient) -> None:
    answer = answer_to(client, "sampling", n=3, seed=5)
    seeds = [json.loads(it["message"]["content"])["seed"] for it in answer["choices"]]
    assert [it["index"] for it in answer["choices"]] == [0, 1, 2]
    assert seeds == [5, 6, 7]
    one = answer_to(client, "sampling", seed=5)
    assert answer["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    events = stream_events(client, "sampling", n=2, seed=5)
    assert [json.loads(joined(events, "content", it))["seed"] for it in (0, 1)] == [5, 6]


def test_logprobs_have_a_token_its_bytes_and_alternatives(client: TestClient) -> None:
    answer = answer_to(client, "say a7", logprobs=True, top_logprobs=2)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    assert entries[0]["token"] == "a"
    assert entries[0]["bytes"] == [97]
    assert entries[0]["logprob"] == -0.5
    assert [it["logprob"] for it in entries[0]["top_logprobs"]] == [-0.5, -1.5]
    events = stream_events(client, "say a7", logprobs=True, top_logprobs=2)
    streamed_entries = [
        entry
        for event in events
        for choice in event["choices"]
        for entry in (choice["logprobs"] or {}).get("content", [])
    ]
    assert streamed_entries == entries


def test_the_pairs_sampling_defaults_apply(client: TestClient) -> None:
    sampling = json.loads(message(client, "sampling")["content"])
    assert (sampling["temperature"], sampling["top_k"]) == (0.7, 20)
    assert sampling["eos"] == [315, 317]
    assert json.loads(message(client, "sampling", temperature=0)["content"])["temperature"] == 0


# --- the dial ---


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"reasoning_lambda": 0.6}, "body"),
        ({"model": "pair@0.6"}, "model"),
        ({"headers": {"X-Reasoning-Lambda": "0.6"}}, "header"),
    ],
)
def test_a_lambda_reaches_the_engine_and_is_reported(
    client: TestClient, fields: dict[str, Any], source: str
) -> None:
    response = chat(client, "lambda", **fields)
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "0.6"
    assert answer["routing"] == {
        "reasoning_lambda": 0.6,
        "source": source,
        "profile": "neutral",
        "routing_class": "default",
    }
    assert response.headers["X-Reasoning-Lambda"] == "0.6"


def test_the_default_lambda_is_the_servers(make_client: MakeClient) -> None:
    assert message(make_client(default_lambda=0.3), "lambda")["content"] == "0.3"


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_lambda": 1.1}, "reasoning_lambda"),
        ({"reasoning_lambda": "0.5"}, "reasoning_lambda"),
        ({"reasoning_lambda": 0.5, "model": "pair@0.6"}, "reasoning_lambda"),
        ({"headers": {"X-Reasoning-Lambda": "nan"}}, "X-Reasoning-Lambda"),
        ({"reasoning_lamda": 0.5}, "reasoning_lamda"),
        ({"tools": []}, "tools"),
        ({"logit_bias": {"9999": 1}}, "logit_bias.9999"),
        ({"stop_token_ids": [9999]}, "stop_token_ids[0]"),
    ],
)
def test_a_bad_request_names_its_field(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    check_error(chat(client, "say x", **fields), 400, "invalid_request_error", param)


def test_an_unknown_model_does_not_exist(client: TestClient) -> None:
    check_error(chat(client, "say x", model="other"), 404, "model_not_found", "model")


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client: TestClient) -> None:
    response = chat(client, "7" * 3000)
    check_error(response, 400, "context_length_exceeded", "messages")
    assert re.search(r"\b30\d\d tokens.*2048", response.json()["error"]["message"])


def test_a_body_that_is_too_long_is_refused(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=1000)
    check_error(chat(client, "x" * 1000), 413, "request_too_large")


def test_errors_of_unknown_paths_and_methods_have_the_same_shape(client: TestClient) -> None:
    check_error(client.get("/v1/nothing"), 404, "not_found")
    check_error(client.get("/v1/chat/completions"), 405, "method_not_allowed")


def test_a_request_that_fails_in_the_engine_is_a_500_and_the_next_one_works(
    make_client: MakeClient,
) -> None:
    client = make_client()
    check_error(chat(client, "fail"), 500, "internal_error")
    assert message(client, "say ok")["content"] == "ok"
    wanted = 'mi_request_success_total{finished_reason="error",model_name="pair"} 1.0'
    assert wanted in client.get("/metrics").text


def test_a_failure_inside_a_stream_is_its_last_event(client: TestClient) -> None:
    response = chat(client, "fail", stream=True)
    assert response.status_code == 200
    last = response.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the prompt says so"


def test_a_request_that_the_engine_rejects_is_a_400_and_the_others_go_on(
    client: TestClient,
) -> None:
    response = chat(client, "reject")
    check_error(response, 400, "invalid_request_error", "messages")
    assert response.json()["error"]["message"] == "the prompt says so"
    *_, last, _ = chat(client, "reject", stream=True, n=2).text.split("\n\n")
    assert json.loads(last.removeprefix("data: ")) == response.json()
    assert message(client, "say ok")["content"] == "ok"


def test_a_rejection_by_the_engine_looks_like_a_refusal_by_the_server(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client("--context", "64")
    engine = client.app_state["service"].engine
    errors = []
    for limit in (64, 10**6):  # the second one lets the prompt through to the engine
        monkeypatch.setattr(engine, "info", replace(engine.info, max_model_len=limit))
        response = chat(client, "a" * 100)
        check_error(response, 400, "context_length_exceeded", "messages")
        errors.append(response.json()["error"])
    assert errors[0].pop("message") != errors[1].pop("message")
    assert errors[0] == errors[1]


# --- loading, draining and failing ---


def test_while_loading_requests_are_refused_with_retry_after(
    make_client: MakeClient, tmp_path: Path, wait_until: WaitUntil
) -> None:
    gate = tmp_path / "gate"
    client = make_client("--load-gate", str(gate), wait=False)
    check_error(client.get("/ready"), 503, "loading")
    response = chat(client, "say x")
    check_error(response, 503, "loading")
    assert 1 <= int(response.headers["Retry-After"]) <= 120
    assert client.get("/health").status_code == 200
    gate.touch()
    wait_until(lambda: client.get("/ready").status_code == 200)
    assert message(client, "say x")["content"] == "x"


def test_while_draining_requests_are_refused_and_the_server_is_healthy(
    make_client: MakeClient,
) -> None:
    client = make_client()
    client.app_state["service"].draining = True
    check_error(client.get("/ready"), 503, "draining")
    check_error(chat(client, "say x"), 503, "draining")
    assert client.get("/health").status_code == 200


def test_an_engine_that_dies_fails_the_answer_and_the_health_check(make_client: MakeClient) -> None:
    client = make_client()
    check_error(chat(client, "die"), 503, "engine_dead")
    check_error(client.get("/health"), 503, "engine_dead")
    check_error(client.get("/ready"), 503, "engine_dead")
    check_error(chat(client, "say x"), 503, "engine_dead")
    ended = client.app_state["service"].engine.ended
    assert ended.exit_code == 1
    assert "exit code 7" in str(ended)


def test_a_failed_load_is_reported_with_its_reason(
    make_client: MakeClient, wait_until: WaitUntil
) -> None:
    client = make_client("--fail-load", "tensor x is missing", wait=False)
    wait_until(lambda: client.get("/health").status_code == 503)
    ended = client.app_state["service"].engine.ended
    assert (str(ended), ended.exit_code) == ("tensor x is missing", 2)


# --- models, ids, logs and metrics ---


def test_the_list_of_models_has_aliases_with_a_parent(client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert models[0]["id"] == "pair"
    assert models[0]["max_model_len"] == 2048
    assert models[0]["parent"] is None
    reported = {"identity", "instruct", "thinking", "layers", "delta_dtype"}
    assert set(models[0]["pair"]) == reported
    assert (models[0]["pair"]["identity"], models[0]["pair"]["layers"]) == ("1" * 32, 4)
    assert {model["parent"] for model in models[1:]} == {"pair"}


def test_an_alias_with_any_lambda_is_a_model(client: TestClient) -> None:
    model = client.get("/v1/models/pair@0.37").json()
    assert (model["id"], model["root"], model["reasoning_lambda"]) == ("pair@0.37", "pair", 0.37)
    check_error(client.get("/v1/models/other"), 404, "model_not_found", "model")
    check_error(client.get("/v1/models/pair@7"), 404, "model_not_found", "model")


def test_the_version_is_that_of_the_package(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": server.__version__}
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert "version" in project.get("dynamic", []) or project["version"] == server.__version__


def test_a_clients_request_id_is_returned_and_is_the_answers_id(client: TestClient) -> None:
    response = chat(client, "say x", headers={"X-Request-Id": "mine-1"})
    assert response.headers["X-Request-Id"] == response.json()["id"] == "mine-1"
    again = chat(client, "say x")
    assert again.json()["id"] == f"chatcmpl-{again.headers['X-Request-Id']}"


def test_a_request_id_with_spaces_is_replaced(client: TestClient) -> None:
    response = chat(client, "say x", headers={"X-Request-Id": "a b status=500"})
    assert response.headers["X-Request-Id"] != "a b status=500"


def test_every_request_is_logged_in_one_line_with_its_timings(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "server.ops.request_log"):
        chat(client, REASONED, stream=True, reasoning_lambda=0.6, user="a\nb c")
    (record,) = [it for it in caplog.records if it.name == "server.ops.request_log"]
    line = logs.formatter("text").format(record)
    assert " INFO server.ops.request_log: POST /v1/chat/completions 200 id=" in line
    for part in ("lambda=0.6", "source=body", "finish=stop", "reasoning=5"):
        assert part in line
    assert r"user='a\nb c'" in line
    seconds = [record.fields[f"{stage}_s"] for stage in ("prepare", "queue", "prefill", "decode")]
    assert min(seconds) >= 0
    assert sum(seconds) <= record.fields["total_s"] + 0.001
    assert record.fields["first_token_s"] > 0


def test_the_metrics_count_a_request(make_client: MakeClient) -> None:
    client = make_client()
    answer_to(client, REASONED, reasoning_lambda=0.6)
    text = client.get("/metrics").text
    for line in (
        'mi_request_success_total{finished_reason="stop",model_name="pair"} 1.0',
        'mi_reasoning_tokens_total{model_name="pair"} 5.0',
        'mi_time_to_first_token_seconds_count{lambda_bucket="0.6-0.7",model_name="pair"} 1.0',
        'mi_cache_config_info{block_size="16",dtype="float32",max_model_len="2048"',
    ):
        assert line in text


def test_more_choices_than_the_engine_and_the_queue_hold_are_refused(
    make_client: MakeClient,
) -> None:
    client = make_client(max_num_seqs=1, max_waiting=0)
    check_error(chat(client, "say x", n=2), 400, "invalid_request_error", "n")
    assert message(client, "say x")["content"] == "x"


# --- continuing the final message, and priority ---


def test_a_final_message_that_is_not_the_assistants_cannot_be_continued(
    client: TestClient,
) -> None:
    response = chat(client, "say hi", continue_final_message=True)
    check_error(response, 400, "invalid_request_error", "continue_final_message")


def test_a_message_is_continued_or_a_new_one_begun_not_both(client: TestClient) -> None:
    fields = {"continue_final_message": True, "add_generation_prompt": True}
    response = chat(client, "say hi", **fields)
    check_error(response, 400, "invalid_request_error", "add_generation_prompt")


def test_a_priority_reaches_the_engine(client: TestClient) -> None:
    request = json.loads(message(client, "request", priority=7)["content"])
    assert request["priority"] == 7


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 0.5, "1"])
def test_a_priority_is_a_whole_number_within_bounds(client: TestClient, value: Any) -> None:
    response = chat(client, "say hi", priority=value)
    check_error(response, 400, "invalid_request_error", "priority")


def test_a_long_body_is_parsed_outside_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def parse(body: bytes) -> ChatRequest:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        parsed.append(len(body))
        return parse_chat_request(body)

    monkeypatch.setattr(api_chat, "parse_chat_request", parse)
    messages = [{"role": "user", "content": "x" * 100}] * 999
    check_error(chat(client, "", messages=messages), 400, "context_length_exceeded", "messages")
    assert parsed[0] > 99_900


def test_more_than_16384_messages_are_refused(
    client: TestClient,
) -> None:
    refused = chat(client, "", messages=[{"role": "user", "content": ""}] * 16385)
    check_error(refused, 400, "invalid_request_error", "messages")


def test_the_first_answer_token_is_not_the_tag_that_opens_the_block(
    make_client: MakeClient,
) -> None:
    client = make_client()
    chat(client, "say <think>\na\n</think>\n\nb")
    chat(client, "say <think>\nnever closed", max_tokens=4)
    labels = {"lambda_bucket": "0.8-0.9"}
    assert metric(client, "mi_time_to_first_token_seconds_count", **labels) == 2
    assert metric(client, "mi_time_to_first_answer_token_seconds_count", **labels) == 1
