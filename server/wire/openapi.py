"""The OpenAPI document: every route, what it takes, and everything it may answer.

Bodies are read by hand, so the document is written from this table and the typed models, and not
by the web framework. A new route is one more `Operation`; a test finds routes without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.wire import responses as answers
from server.wire.chat_request import ChatRequest
from server.wire.completion_request import CompletionRequest
from server.wire.tokenize_request import DetokenizeRequest, TokenizeRequest

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
PLAIN: Final = "text/plain"
HTML: Final = "text/html"

REFUSALS: Final = {
    400: "The request is not valid; `param` names the field",
    401: "The API key is missing or wrong",
    404: "No such model, or no such route",
    413: "The body is too long",
    429: "The key is over its limit; Retry-After says when to come back",
    500: "This request failed; others went on",
    503: "Loading, draining, overloaded, or without an engine; Retry-After says when to come back",
    504: "The deadline passed",
}
WITH_RETRY_AFTER: Final = (429, 503)

OF_ANY: Final = (401, 429, 500)
OF_A_BODY: Final = (400, 404, 413, *OF_ANY)
OF_AN_ANSWER: Final = (*OF_A_BODY, 503, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. `answer`: the bodies of its 200 by their media type; None: any text."""

    method: str
    path: str
    summary: str
    answer: dict[str, type[BaseModel] | None]
    refusals: Sequence[int] = ()
    body: type[BaseModel] | None = None
    header_of_lambda: bool = False  # reads X-Reasoning-Lambda
    tells_lambda: bool = False  # and answers with it


OPERATIONS: Final = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer messages, at any λ",
        {JSON: answers.ChatCompletion, EVENTS: answers.ChatCompletionChunk},
        OF_AN_ANSWER,
        ChatRequest,
        header_of_lambda=True,
        tells_lambda=True,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continue raw prompts, and score them",
        {JSON: answers.Completion, EVENTS: answers.CompletionChunk},
        OF_AN_ANSWER,
        CompletionRequest,
        header_of_lambda=True,
        tells_lambda=True,
    ),
    Operation(
        "post",
        "/tokenize",
        "Token ids of a text, or of messages in their template",
        {JSON: answers.Tokens},
        (*OF_A_BODY, 503),
        TokenizeRequest,
        header_of_lambda=True,
    ),
    Operation(
        "post",
        "/detokenize",
        "The text of token ids",
        {JSON: answers.Text},
        OF_A_BODY,
        DetokenizeRequest,
    ),
    Operation(
        "get",
        "/v1/models",
        "The served name and some of its aliases",
        {JSON: answers.ModelList},
        OF_ANY,
    ),
    Operation(
        "get",
        "/v1/models/{name}",
        "One model or alias",
        {JSON: answers.Model},
        (400, 404, *OF_ANY),
    ),
    Operation(
        "get",
        "/v1/profiles",
        "The active profile, and what the router makes of it",
        {JSON: answers.ActiveProfile},
        (*OF_ANY, 503),
    ),
    Operation(
        "get",
        "/health",
        "Whether server and engine are alive",
        {JSON: answers.Status},
        (500, 503),
    ),
    Operation(
        "get",
        "/ready",
        "Whether requests are taken",
        {JSON: answers.Status},
        (500, 503),
    ),
    Operation("get", "/", "The playground page", {HTML: None}, (500,)),
    Operation("get", "/metrics", "What Prometheus reads", {PLAIN: None}, (500,)),
    Operation("get", "/version", "The server's version", {JSON: answers.Version}, OF_ANY),
    Operation("get", "/openapi.json", "This document", {JSON: None}, OF_ANY),
)


@cache
def document(version: str) -> dict[str, Any]:
    """The whole document, as OpenAPI 3.1 has it. It is built once: nobody may change it."""
    refs, definitions = models_json_schema(
        [(model, "validation") for model in _models()],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described = _described(operation, {key[0]: ref for key, ref in refs.items()})
        paths.setdefault(operation.path, {})[operation.method] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "mi-server", "version": version},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _models() -> list[type[BaseModel]]:
    """Every model of the table, once."""
    named: list[type[BaseModel]] = [answers.Error]
    for operation in OPERATIONS:
        named += [model for model in (operation.body, *operation.answer.values()) if model]
    return list(dict.fromkeys(named))


def _described(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    responses = {"200": _success(operation, refs)}
    for status in sorted(operation.refusals):
        responses[str(status)] = _refusal(status, refs[answers.Error])
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    parameters = _parameters(operation)
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        content = {JSON: {"schema": refs[operation.body]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _success(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    content = {
        media: {"schema": {} if model is None else refs[model]}
        for media, model in operation.answer.items()
    }
    if EVENTS in content:
        content[EVENTS]["schema"] = _event(content[EVENTS]["schema"], refs[answers.Error])
    headers = {"X-Request-Id": _header("The request's id, the client's own where it gave one")}
    if operation.tells_lambda:
        headers["X-Reasoning-Lambda"] = _header("λ that the answer ran at")
    description = operation.summary
    if EVENTS in content:
        description += "; with `stream` as events of a chunk each, the last of `[DONE]` or an error"
    return {"description": description, "content": content, "headers": headers}


def _event(chunk: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """The schema of one event, whose data is JSON, or what ends a stream that had no error."""
    of_data = {"anyOf": [chunk, error]}
    json_text = {"type": "string", "contentMediaType": JSON, "contentSchema": of_data}
    data = {"anyOf": [{"const": "[DONE]"}, json_text]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _refusal(status: int, error: dict[str, Any]) -> dict[str, Any]:
    refusal = {"description": REFUSALS[status], "content": {JSON: {"schema": error}}}
    if status in WITH_RETRY_AFTER:
        retry = {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}
        refusal["headers"] = {"Retry-After": retry}
    return refusal


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters = []
    if "{name}" in operation.path:
        text = {"type": "string", "minLength": 1}
        parameters.append({"name": "name", "in": "path", "required": True, "schema": text})
    if operation.header_of_lambda:
        number = {"type": "number", "minimum": 0, "maximum": 1}
        parameters.append({"name": "X-Reasoning-Lambda", "in": "header", "schema": number})
    return parameters


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}
