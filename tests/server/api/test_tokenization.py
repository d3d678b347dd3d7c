"""`/tokenize` turns a text or messages into token ids, and `/detokenize` turns them back."""

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.text.vocabulary import Vocabulary
from tests.server.chat_requests import MakeClient, check_error

HI = [{"role": "user", "content": "hi"}]


def tokenized(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def round_trip(client: TestClient, **body: Any) -> str:
    """Returns the text of a body that is tokenized and then detokenized."""
    response = client.post("/detokenize", json={"tokens": tokenized(client, **body)["tokens"]})
    assert response.status_code == 200
    prompt: str = response.json()["prompt"]
    return prompt


def test_a_text_becomes_its_token_ids(client: TestClient, vocabulary: Vocabulary) -> None:
    answer = tokenized(client, prompt="hi<|im_end|>")
    ids = vocabulary.encode("hi<|im_end|>")
    assert answer == {"count": 3, "max_model_len": 2048, "tokens": ids, "token_strs": None}


def test_the_text_of_every_token_is_returned_on_request(client: TestClient) -> None:
    answer = tokenized(client, prompt="a7<think>", return_token_strs=True, model="pair")
    assert answer["token_strs"] == ["a", "7", "<think>"]


def test_lambda_selects_the_template_of_messages(make_client: MakeClient) -> None:
    client = make_client(opening=True)
    instruct = round_trip(client, messages=HI, reasoning_lambda=0)
    assert instruct == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert round_trip(client, messages=HI) == instruct + "<think>\n"
    assert round_trip(client, messages=HI, model="pair@0") == instruct
    turn = "<|im_start|>user\nhi<|im_end|>\n"
    assert round_trip(client, messages=HI, add_generation_prompt=False) == turn


def test_a_message_can_be_left_open(client: TestClient) -> None:
    messages = [*HI, {"role": "assistant", "content": "so "}]
    assert round_trip(client, messages=messages, continue_final_message=True).endswith(
        "assistant\nso "
    )


def test_texts_are_tokenized_and_detokenized_while_the_engine_loads(
    make_client: MakeClient,
) -> None:
    client = make_client("--load-gate", "/nonexistent", wait=False)
    assert tokenized(client, prompt="hi")["max_model_len"] is None
    assert round_trip(client, prompt="hi") == "hi"


def test_an_empty_text_has_no_tokens(client: TestClient) -> None:
    assert round_trip(client, prompt="") == ""


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": HI}, "prompt"),
        ({"prompt": "x", "reasoning_lambda": 0.5}, "reasoning_lambda"),
        ({"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": HI, "add_special_tokens": False}, "add_special_tokens"),
        ({"messages": HI, "continue_final_message": True}, "continue_final_message"),
        ({"messages": HI, "reasoning_lambda": 1.5}, "reasoning_lambda"),
        ({"messages": []}, "messages"),
        ({"prompt": 5}, "prompt"),
        ({"promt": "x"}, "promt"),
    ],
)
def test_a_bad_field_of_tokenize_is_named(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    response = client.post("/tokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "tokens"), ({"tokens": [1, 10**6]}, "tokens[1]"), ({"tokens": [-1]}, "tokens[0]")],
)
def test_a_bad_field_of_detokenize_is_named(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    response = client.post("/detokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found_and_a_long_body_is_refused(
    make_client: MakeClient, path: str
) -> None:
    client = make_client(max_body_bytes=100)
    body = {"model": "other", "prompt": "x"} if path == "/tokenize" else {"model": "other"}
    body |= {} if path == "/tokenize" else {"tokens": []}
    assert client.post(path, json=body).status_code == 404
    assert client.post(path, json={"prompt": "x" * 200}).status_code == 413


def test_answers_are_built_outside_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of four million tokens, and their JSON, stopped every stream for six seconds."""
    seen = []

    def token_text(self: Vocabulary, token_id: int) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        seen.append(token_id)
        return str(token_id)

    monkeypatch.setattr(Vocabulary, "token_text", token_text)
    answer = tokenized(client, prompt="a7", return_token_strs=True)
    assert answer["token_strs"] == [str(one) for one in seen]
    assert len(seen) == 2


def test_while_loading_messages_are_refused(make_client: MakeClient) -> None:
    """The profile, which selects the template, is known after loading: messages were a 500."""
    client = make_client("--load-gate", "/nonexistent", wait=False)
    check_error(client.post("/tokenize", json={"messages": HI}), 503, "loading")


def test_messages_are_checked_as_in_a_chat(client: TestClient) -> None:
    """`/tokenize` accepted messages that chat refused."""
    response = client.post("/tokenize", json={"messages": [{"role": "user"}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content"


def test_a_message_that_ends_with_calls_cannot_be_continued(client: TestClient) -> None:
    """Its calls follow its text, and were left out of the prompt."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = {"role": "assistant", "tool_calls": [call]}
    body = {"messages": [*HI, last], "continue_final_message": True}
    response = client.post("/tokenize", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "continue_final_message"
