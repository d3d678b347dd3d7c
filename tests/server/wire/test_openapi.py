"""The OpenAPI document describes every route, and real answers match it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from server.wire.openapi import OPERATIONS, document
from tests.server.chat_requests import MakeClient

DOCUMENT = document("1")
HI = [{"role": "user", "content": "say <think>\nso\n</think>\n\nhi"}]


def with_components(ref: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema with the document's components, to which its references lead."""
    return ref | {"components": DOCUMENT["components"]}


def check_response(method: str, path: str, status: int, media: str, body: Any) -> None:
    responses = DOCUMENT["paths"][path][method]["responses"]
    schema = responses[str(status)]["content"][media]["schema"]
    if media == "text/event-stream":
        done, json_text = schema["properties"]["data"]["anyOf"]
        assert done == {"const": "[DONE]"}
        schema = json_text["contentSchema"]
    jsonschema.Draft202012Validator(with_components(schema)).validate(body)


def check_request(path: str, body: dict[str, Any]) -> None:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    schema = with_components(content["application/json"]["schema"])
    jsonschema.Draft202012Validator(schema).validate(body)


def routes(client: TestClient) -> Iterator[tuple[str, str]]:
    app = client.app
    while not isinstance(app, FastAPI):  # inside middleware
        app = app._app  # type: ignore[attr-defined]
    for route in app.routes:
        assert isinstance(route, APIRoute)
        for method in route.methods:
            yield method.lower(), re.sub(r":\w+}", "}", route.path)


def test_every_route_of_the_app_is_described_and_no_other(client: TestClient) -> None:
    described = {(one.method, one.path) for one in OPERATIONS}
    assert described == set(routes(client))
    assert len(described) == len(OPERATIONS)


def test_the_server_answers_with_the_document(client: TestClient) -> None:
    served = client.get("/openapi.json").json()
    assert served["paths"] == json.loads(json.dumps(DOCUMENT["paths"]))
    assert served["openapi"].startswith("3.1")


def test_every_schema_is_valid_and_every_reference_leads_to_one() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    refs = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(DOCUMENT)))
    assert refs == set(schemas)


def test_every_field_of_a_request_has_a_description() -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            schema = DOCUMENT["components"]["schemas"][operation.body.__name__]
            undescribed = [
                name for name, it in schema["properties"].items() if "description" not in it
            ]
            assert undescribed == []


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT = {"model": "pair", "messages": HI}
CHATS = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 2},
    {"reasoning_lambda": [0.1, 0.9]},
    {"reasoning_lambda": {"default": 0.5, "layers": {"0-1": {"mlp": 0.1}}}, "answer_lambda": 0.2},
    {"thinking_token_budget": 1},
    {"messages": [{"role": "user", "content": f"say {CALL}"}], "tools": [TOOL]},
]
TEXTS = [
    {"prompt": "say hi"},
    {"prompt": ["say hi", "say ho"], "n": 2, "echo": True, "logprobs": 2},
    {"prompt": [[80, 81], [82]], "max_tokens": 0, "echo": True, "logprobs": 0},
    {"prompt": "say hi", "reasoning_lambda": [0.1, 0.9]},
]
CASES = [
    *(("/v1/chat/completions", CHAT | fields) for fields in CHATS),
    *(("/v1/completions", {"model": "pair"} | fields) for fields in TEXTS),
]


def written_fields(*bodies: dict[str, Any]) -> set[str]:
    """Returns the fields of answers or chunks and of their choices, without the choices' text."""
    choices = [choice for body in bodies for choice in body["choices"]]
    of_choices = {name for choice in choices for name in choice} - {"message", "delta"}
    return {name for body in bodies for name in body} | {f"choice.{name}" for name in of_choices}


@pytest.mark.parametrize(("path", "body"), CASES, ids=lambda it: str(it)[:60])
def test_answers_and_streams_are_as_described(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    check_request(path, body)
    plain = client.post(path, json=body)
    check_response("post", path, plain.status_code, "application/json", plain.json())
    assert plain.status_code == 200
    streaming = body | {"stream": True, "stream_options": {"include_usage": True}}
    check_request(path, streaming)
    *events, done, _ = client.post(path, json=streaming).text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        check_response("post", path, 200, "text/event-stream", chunk)
    assert written_fields(*chunks) == written_fields(plain.json())


def test_an_error_that_ends_a_stream_is_as_described(client: TestClient) -> None:
    failing = {"model": "pair", "messages": [{"role": "user", "content": "fail"}], "stream": True}
    *_, last, _ = client.post("/v1/chat/completions", json=failing).text.split("\n\n")
    error = json.loads(last.removeprefix("data: "))
    assert error["error"]["code"] == "internal_error"
    check_response("post", "/v1/chat/completions", 200, "text/event-stream", error)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "hi", "return_token_strs": True}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [80, 81]}),
    ],
)
def test_answers_about_tokens_are_as_described(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    check_request(path, body)
    check_response("post", path, 200, "application/json", client.post(path, json=body).json())


@pytest.mark.parametrize(
    ("described", "path"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/{name}", "/v1/models/pair"),
        ("/v1/models/{name}", "/v1/models/pair@0.5"),
        ("/health", "/health"),
        ("/ready", "/ready"),
        ("/version", "/version"),
    ],
)
def test_the_answers_about_the_server_are_as_described(
    client: TestClient, described: str, path: str
) -> None:
    check_response("get", described, 200, "application/json", client.get(path).json())


def test_refusals_are_as_described(make_client: MakeClient) -> None:
    client, path = make_client(max_body_bytes=5000), "/v1/chat/completions"
    refused = [
        client.post(path, json=CHAT | {"temperature": 9}),
        client.post(path, json=CHAT | {"model": "other"}),
        client.post(path, json=CHAT | {"user": "x" * 6000}),
        client.post(path, content=b"{"),
        client.post(path, json=CHAT | {"messages": [{"role": "user", "content": "fail"}]}),
    ]
    assert [response.status_code for response in refused] == [400, 404, 413, 400, 500]
    for response in refused:
        check_response("post", path, response.status_code, "application/json", response.json())


@pytest.mark.parametrize("path", [one.path for one in OPERATIONS if one.method == "get"])
def test_a_route_refuses_keys_and_deadlines_only_where_the_document_says_so(
    make_client: MakeClient, path: str
) -> None:
    client, described = make_client(api_key=["secret"]), DOCUMENT["paths"][path]["get"]["responses"]
    path = path.replace("{name}", "pair")
    assert (client.get(path).status_code == 401) is ("401" in described)
    headers = {"Authorization": "Bearer secret", "X-Request-Timeout": "soon"}
    assert (client.get(path, headers=headers).status_code == 400) is ("400" in described)


def test_a_loading_server_refuses_as_described(make_client: MakeClient) -> None:
    client = make_client("--load-gate", "/nonexistent", wait=False)
    for method, path in [("post", "/v1/completions"), ("get", "/ready")]:
        response = client.request(method, path)
        assert response.status_code == 503
        check_response(method, path, 503, "application/json", response.json())
        refusal = DOCUMENT["paths"][path][method]["responses"]["503"]
        assert all(response.headers[name] for name in refusal["headers"])
