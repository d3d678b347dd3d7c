"""`POST /v1/completions` continues raw prompts, which are the commands of the fake engine."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.text.vocabulary import Vocabulary
from tests.server.chat_requests import MakeClient, body_in, events_in, metric


def post(client: TestClient, prompt: Any, **fields: Any) -> Any:
    headers = fields.pop("headers", {})
    body = {"model": "pair", "prompt": prompt} | fields
    return client.post("/v1/completions", json=body, headers=headers)


def answer_to(client: TestClient, prompt: Any, **fields: Any) -> dict[str, Any]:
    return body_in(post(client, prompt, **fields))


def texts(answer: dict[str, Any]) -> list[str]:
    """Returns the text of each choice, in order of their indices."""
    assert [choice["index"] for choice in answer["choices"]] == [*range(len(answer["choices"]))]
    return [choice["text"] for choice in answer["choices"]]


def stream_events(client: TestClient, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    return events_in(post(client, prompt, stream=True, **fields))


def refusal(client: TestClient, prompt: Any = "say hi", **fields: Any) -> dict[str, Any]:
    """Returns the error of a request that is refused with a 400."""
    response = post(client, prompt, **fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# --- answers ---


def test_a_text_is_continued_without_a_template(client: TestClient) -> None:
    answer = answer_to(client, "say hi", reasoning_lambda=0.3)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["routing"]["reasoning_lambda"] == 0.3
    assert answer["usage"]["prompt_tokens"] == len("say hi")  # a token each
    assert answer["usage"]["completion_tokens"] == 3  # and the end


def test_the_engine_follows_no_think_block_and_tags_are_text(client: TestClient) -> None:
    assert json.loads(texts(answer_to(client, "request", max_tokens=200))[0])["think"] is None
    text = "<think>\nx\n</think>\n\ny"
    answer = answer_to(client, f"say {text}", max_tokens=50)
    assert texts(answer) == [text]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_an_answer_has_sixteen_tokens_by_default(client: TestClient) -> None:
    answer = answer_to(client, "forever")
    assert texts(answer) == ["a" * 16]
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_alias_and_a_header_set_lambda(client: TestClient) -> None:
    assert texts(answer_to(client, "lambda", model="pair@0.4")) == ["0.4"]
    header = {"X-Reasoning-Lambda": "0.2"}
    response = post(client, "lambda", headers=header)
    assert response.json()["choices"][0]["text"] == "0.2"
    assert response.headers["X-Reasoning-Lambda"] == "0.2"


def test_several_prompts_of_any_form_are_answered_in_one_request(
    client: TestClient, vocabulary: Vocabulary
) -> None:
    one, two = vocabulary.encode("say a"), vocabulary.encode("say bc")
    assert texts(answer_to(client, one)) == ["a"]
    assert texts(answer_to(client, [one, two])) == ["a", "bc"]
    batch = answer_to(client, ["say a", "say bc"])
    assert texts(batch) == ["a", "bc"]
    assert batch["usage"]["prompt_tokens"] == len(one) + len(two)


def test_choices_are_in_order_of_their_prompts(client: TestClient, vocabulary: Vocabulary) -> None:
    answer = answer_to(client, ["request", "say hi"], n=2, seed=7, max_tokens=200)
    assert [json.loads(text)["seed"] for text in texts(answer)[:2]] == [7, 8]
    assert texts(answer)[2:] == ["hi", "hi"]
    once = len(vocabulary.encode("request")) + len(vocabulary.encode("say hi"))
    assert answer["usage"]["prompt_tokens"] == once


def test_a_fan_out_gives_each_prompt_a_choice_for_each_lambda(client: TestClient) -> None:
    answer = answer_to(client, ["lambda", "lambda"], reasoning_lambda=[0.1, 0.9])
    assert texts(answer) == ["0.1", "0.9"] * 2
    lambdas = [choice["reasoning_lambda"] for choice in answer["choices"]]
    assert lambdas == [0.1, 0.9, 0.1, 0.9]
    assert answer["usage"]["prompt_tokens"] == 2 * len("lambda")


def test_a_stop_string_ends_the_text(client: TestClient) -> None:
    answer = answer_to(client, "say one. two", stop=". ")
    assert texts(answer) == ["one"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_best_of_equal_to_n_is_accepted(client: TestClient) -> None:
    assert texts(answer_to(client, "say hi", n=2, best_of=2)) == ["hi", "hi"]


def test_a_priority_reaches_the_engine(client: TestClient) -> None:
    request = json.loads(texts(answer_to(client, "request", priority=-3, max_tokens=200))[0])
    assert request["priority"] == -3


# --- echo and log-probabilities ---


def test_echo_begins_with_the_prompt_and_stop_strings_do_not_cut_it(client: TestClient) -> None:
    assert texts(answer_to(client, "say hi", echo=True, stop="s")) == ["say hihi"]


def test_logprobs_are_columns_with_the_token_among_the_best(client: TestClient) -> None:
    logprobs = answer_to(client, "say 01", logprobs=2, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["0", "1"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["top_logprobs"][0] == {"0": -0.5, "1": -1.5}
    assert logprobs["text_offset"] == [0, 1]


def test_logprobs_without_alternatives_have_the_token_itself(client: TestClient) -> None:
    logprobs = answer_to(client, "say 0", logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"0": -0.5}]


def test_echo_with_logprobs_has_those_of_the_prompt_but_of_its_first_token(
    client: TestClient,
) -> None:
    (choice,) = answer_to(client, "say 0", echo=True, logprobs=1, max_tokens=1)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["s", "a", "y", " ", "0", "0"]
    assert logprobs["token_logprobs"] == [None, -1, -2, -3, -4, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"a": -1}]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert choice["text"] == "say 00"


def test_echo_without_new_tokens_returns_the_prompt_and_its_logprobs(
    client: TestClient, vocabulary: Vocabulary
) -> None:
    for prompt in ("say hi", vocabulary.encode("say hi")):
        answer = answer_to(client, prompt, echo=True, logprobs=1, max_tokens=0)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("say hi", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -1, -2, -3, -4, -5]
        assert answer["usage"]["completion_tokens"] == 0
        plain = answer_to(client, prompt, echo=True, max_tokens=0)
        assert plain["choices"][0] == choice | {"logprobs": None}


def test_without_echo_or_logprobs_a_prompt_has_no_logprobs(client: TestClient) -> None:
    without_echo = answer_to(client, "say 0", logprobs=1, max_tokens=1)["choices"][0]
    assert without_echo["logprobs"]["tokens"] == ["0"]
    assert answer_to(client, "say 0", echo=True)["choices"][0]["logprobs"] is None


# --- streams ---


def test_a_stream_adds_up_to_the_plain_answer(client: TestClient) -> None:
    fields = {"echo": True, "logprobs": 1, "n": 2, "max_tokens": 3}
    plain = answer_to(client, ["say 01", "say 2"], **fields)
    events = stream_events(
        client, ["say 01", "say 2"], stream_options={"include_usage": True}, **fields
    )
    chunks = [choice for event in events for choice in event["choices"]]
    for choice in plain["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for column, values in choice["logprobs"].items():
            written = [chunk["logprobs"][column] for chunk in mine if chunk["logprobs"]]
            assert [value for part in written for value in part] == values
    assert {event["object"] for event in events} == {"text_completion"}
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["usage"] == plain["usage"]
    assert events[0]["routing"] == events[-1]["routing"] == plain["routing"]


def test_a_failure_in_a_stream_is_its_last_event(client: TestClient) -> None:
    response = post(client, "fail", stream=True)
    *_, last, rest = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the prompt says so"
    assert rest == ""


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [[1], 2]}, "prompt[1]"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[1], [10**6]]}, "prompt[1]"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": []}, "messages"),
        ({"answer_lambda": 0.5}, "answer_lambda"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"reasoning": {"exclude": True}}, "reasoning.exclude"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"priority": 2**31}, "priority"),
        ({"reasoning_lambda": 2}, "reasoning_lambda"),
        ({"stream_options": {}}, "stream_options"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids[0]"),
        ({"tempratur": 1}, "tempratur"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    assert refusal(client, **fields)["param"] == param


def test_a_prompt_that_is_too_long_is_named(client: TestClient) -> None:
    error = refusal(client, ["say hi", "a" * 5000])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_while_loading_requests_are_refused_with_retry_after(make_client: MakeClient) -> None:
    client = make_client("--load-gate", "/nonexistent", wait=False)
    response = post(client, "say hi")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "loading"
    assert response.headers["Retry-After"]


# --- limits and endings, which are those of chat ---


@pytest.mark.parametrize("prompt", ["forever", "wait", ["say x", "wait"]])
def test_a_text_that_takes_too_long_is_a_504(make_client: MakeClient, prompt: Any) -> None:
    client = make_client(request_timeout=0.5)
    response = post(client, prompt, max_tokens=2000, ignore_eos=True)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert metric(client, "mi_request_success_total", finished_reason="deadline")


def test_a_stream_of_texts_past_its_deadline_ends_with_one_error(client: TestClient) -> None:
    response = post(client, ["wait", "wait"], headers={"X-Request-Timeout": "0.3"}, stream=True)
    *_, last, rest = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert (response.text.count('"error"'), rest) == (1, "")
    assert metric(client, "mi_request_success_total", finished_reason="deadline") == 2


def test_texts_count_against_the_same_quota(make_client: MakeClient) -> None:
    client = make_client(rate_limit_requests=1)
    answer_to(client, "say x")
    refused = post(client, "say x", stream=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 120


def test_an_engine_that_dies_fails_every_choice_in_one_error(make_client: MakeClient) -> None:
    client = make_client()
    response = post(client, ["die", "wait"], stream=True, max_tokens=9)
    *_, last, rest = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert (response.text.count('"error"'), rest) == (1, "")
    assert metric(client, "mi_request_success_total", finished_reason="error") == 2
