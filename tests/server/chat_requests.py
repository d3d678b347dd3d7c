"""Sends chat requests to an app, and reads its answers, streams, errors and metrics."""

import json
from collections.abc import Callable
from typing import Any

from starlette.testclient import TestClient

from server.service import Service

MakeClient = Callable[..., TestClient]
WaitUntil = Callable[..., None]


def chat(
    client: TestClient, content: str, headers: dict[str, str] | None = None, **fields: Any
) -> Any:
    """Posts a request of one user message, and returns the response."""
    body = {"model": "pair", "messages": [{"role": "user", "content": content}]} | fields
    return client.post("/v1/chat/completions", json=body, headers=headers)


def answer_to(client: TestClient, content: str, **fields: Any) -> dict[str, Any]:
    """Returns the body of the 200 that a request gets."""
    return body_in(chat(client, content, **fields))


def stream_events(client: TestClient, content: str, **fields: Any) -> list[dict[str, Any]]:
    """Returns the events of a request's stream, which ends with `[DONE]`."""
    return events_in(chat(client, content, stream=True, **fields))


def body_in(response: Any) -> dict[str, Any]:
    """Returns the body of a 200."""
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events_in(response: Any) -> list[dict[str, Any]]:
    """Returns the events of a stream that ends with `[DONE]`."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(it.removeprefix("data: ")) for it in events if not it.startswith(":")]


def check_error(response: Any, status: int, code: str, param: str | None = None) -> None:
    """Checks status, code and param of an error, and the shape that all errors have."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert response.headers["X-Request-Id"]


def metric(client: TestClient, name: str, **labels: str) -> float | None:
    """Returns a sample of the app's metrics, or None if there is none."""
    service: Service = client.app_state["service"]
    return service.metrics.registry.get_sample_value(name, {"model_name": "pair"} | labels)
