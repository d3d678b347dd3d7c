"""The OpenAPI document: every route, its request, and every answer it may give.

Bodies are parsed by hand, so the document is made from this table and the typed models, and not by
the web framework. A new route needs an `Operation`; a test finds routes without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.wire import response_models as models
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
    429: "The quota is used up; Retry-After says when to try again",
    500: "This request failed; the others continue",
    503: "Loading, draining, overloaded, or without an engine; Retry-After says when to try again",
    504: "The deadline passed",
}
WITH_RETRY_AFTER: Final = (429, 503)

ANY_ROUTE: Final = (400, 401, 500)  # that needs a key
WITH_BODY: Final = (404, 413, 429, *ANY_ROUTE)
GENERATION: Final = (*WITH_BODY, 503, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. `answer` has the bodies of its 200 by media type; None stands for any text."""

    method: str
    path: str
    summary: str
    answer: dict[str, type[BaseModel] | None]
    refusals: Sequence[int] = ()
    body: type[BaseModel] | None = None
    takes_lambda_header: bool = False  # reads X-Reasoning-Lambda
    sends_lambda_header: bool = False  # answers with X-Reasoning-Lambda


OPERATIONS: Final = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation, at any λ",
        {JSON: models.ChatCompletion, EVENTS: models.ChatCompletionChunk},
        GENERATION,
        ChatRequest,
        takes_lambda_header=True,
        sends_lambda_header=True,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continue raw prompts, and score them",
        {JSON: models.Completion, EVENTS: models.CompletionChunk},
        GENERATION,
        CompletionRequest,
        takes_lambda_header=True,
        sends_lambda_header=True,
    ),
    Operation(
        "post",
        "/tokenize",
        "Token ids of a text, or of messages in their chat template",
        {JSON: models.Tokens},
        (*WITH_BODY, 503),
        TokenizeRequest,
        takes_lambda_header=True,
    ),
    Operation(
        "post",
        "/detokenize",
        "The text of token ids",
        {JSON: models.Text},
        WITH_BODY,
        DetokenizeRequest,
    ),
    Operation(
        "get",
        "/v1/models",
        "The served name and some of its aliases",
        {JSON: models.ModelList},
        ANY_ROUTE,
    ),
    Operation(
        "get",
        "/v1/models/{name}",
        "One model or alias",
        {JSON: models.Model},
        (404, *ANY_ROUTE),
    ),
    Operation(
        "get",
        "/v1/profiles",
        "The active profile, and what the router makes of it",
        {JSON: models.ActiveProfile},
        (*ANY_ROUTE, 503),
    ),
    Operation(
        "get",
        "/health",
        "Whether server and engine are alive",
        {JSON: models.Status},
        (500, 503),
    ),
    Operation(
        "get",
        "/ready",
        "Whether requests are accepted",
        {JSON: models.Status},
        (500, 503),
    ),
    Operation("get", "/", "The playground page", {HTML: None}, (500,)),
    Operation("get", "/metrics", "Metrics for Prometheus", {PLAIN: None}, (500,)),
    Operation("get", "/version", "The server's version", {JSON: models.Version}, (500,)),
    Operation("get", "/openapi.json", "The OpenAPI document", {JSON: None}, ANY_ROUTE),
)


@cache
def document(version: str) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document of the server's `version`.

    It is built once, so callers must not change it.
    """
    refs, definitions = models_json_schema(
        [(model, "validation") for model in _models()],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        item = _operation_object(operation, {key[0]: ref for key, ref in refs.items()})
        paths.setdefault(operation.path, {})[operation.method] = item
    return {
        "openapi": "3.1.0",
        "info": {"title": "mi-server", "version": version},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _models() -> list[type[BaseModel]]:
    """Returns every model in the table, once."""
    named: list[type[BaseModel]] = [models.Error]
    for operation in OPERATIONS:
        named += [model for model in (operation.body, *operation.answer.values()) if model]
    return list(dict.fromkeys(named))


def _operation_object(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    responses = {"200": _success(operation, refs)}
    for status in sorted(operation.refusals):
        responses[str(status)] = _refusal(status, refs[models.Error])
    item: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    parameters = _parameters(operation)
    if parameters:
        item["parameters"] = parameters
    if operation.body is not None:
        content = {JSON: {"schema": refs[operation.body]}}
        item["requestBody"] = {"required": True, "content": content}
    return item


def _success(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    content = {
        media: {"schema": {} if model is None else refs[model]}
        for media, model in operation.answer.items()
    }
    if EVENTS in content:
        content[EVENTS]["schema"] = _event(content[EVENTS]["schema"], refs[models.Error])
    headers = {"X-Request-Id": _header("The request's id; the client's own if it gave one")}
    if operation.sends_lambda_header:
        headers["X-Reasoning-Lambda"] = _header("λ that the answer ran at")
    description = operation.summary
    if EVENTS in content:
        description += (
            "; with `stream`, one chunk in each event, and at the end `[DONE]` or an error"
        )
    return {"description": description, "content": content, "headers": headers}


def _event(chunk: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of one event: JSON, or `[DONE]` at the end of a stream without error."""
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
    if operation.takes_lambda_header:
        number = {"type": "number", "minimum": 0, "maximum": 1}
        parameters.append({"name": "X-Reasoning-Lambda", "in": "header", "schema": number})
    return parameters


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}
