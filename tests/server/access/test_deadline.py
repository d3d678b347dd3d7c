"""Deadlines over the app: before the 200, in a plain answer, in a stream, and in the queue."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.access.deadline import Deadline
from server.service import Service
from server.wire.errors import DeadlineExceeded, InvalidRequest

MakeClient = Callable[..., TestClient]
WaitUntil = Callable[[Callable[[], bool]], None]


def chat(client: TestClient, content: str, timeout: str | None = None, **fields: Any) -> Any:
    body = {"model": "pair", "messages": [{"role": "user", "content": content}]} | fields
    headers = {} if timeout is None else {"X-Request-Timeout": timeout}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def check_error(response: Any, status: int, code: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def metric(client: TestClient, name: str, **labels: str) -> float | None:
    service: Service = client.app_state["service"]
    return service.metrics.registry.get_sample_value(name, {"model_name": "pair"} | labels)


@pytest.fixture
def idle(wait_until: WaitUntil) -> Callable[[TestClient], None]:
    """Wait until the engine has nothing left of any request."""

    def wait(client: TestClient) -> None:
        service: Service = client.app_state["service"]
        stats = lambda: service.engine.stats.running + service.engine.stats.waiting  # noqa: E731
        wait_until(lambda: service.engine.open_requests == 0 and stats() == 0)

    return wait


@pytest.mark.parametrize("content", ["forever", "wait"])
def test_an_answer_that_takes_too_long_is_a_504_and_the_engine_stops(
    content: str, make_client: MakeClient, idle: Callable[[TestClient], None]
) -> None:
    client = make_client(request_timeout=0.5)
    check_error(chat(client, content), 504, "deadline_exceeded")
    idle(client)
    assert metric(client, "mi_request_success_total", finished_reason="deadline") == 1


def test_a_stream_that_takes_too_long_ends_with_an_error(
    make_client: MakeClient, idle: Callable[[TestClient], None]
) -> None:
    client = make_client()
    response = chat(client, "forever", "0.5", stream=True)
    *events, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert len(events) > 2
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    idle(client)


def test_a_deadline_that_passes_before_the_200_is_a_504(make_client: MakeClient) -> None:
    client = make_client(request_timeout=1e-9)
    check_error(chat(client, "say x", stream=True), 504, "deadline_exceeded")
    assert metric(client, "mi_admission_rejections_total", reason="deadline_exceeded") == 1


def test_who_is_in_time_notices_nothing(make_client: MakeClient) -> None:
    client = make_client(request_timeout=100)
    assert chat(client, "say x").json()["choices"][0]["message"]["content"] == "x"
    assert metric(client, "mi_request_success_total", finished_reason="stop") == 1


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", "", "1e400"])
def test_a_timeout_that_is_no_time_is_refused(given: str, make_client: MakeClient) -> None:
    check_error(
        chat(make_client(), "say x", given), 400, "invalid_request_error", "X-Request-Timeout"
    )


@pytest.mark.parametrize(
    ("given", "limit", "seconds"),
    [(None, None, None), (None, 9.0, 9.0), (b"3", None, 3.0), (b"3", 9.0, 3.0), (b"30", 9.0, 9.0)],
)
def test_the_earlier_of_both_deadlines_counts(
    given: bytes | None, limit: float | None, seconds: float | None
) -> None:
    headers = {} if given is None else {b"x-request-timeout": given}
    assert Deadline.of(headers, limit, arrived=0.0).seconds == seconds


def test_a_body_that_comes_too_slowly_is_past_its_deadline() -> None:
    async def scenario() -> None:
        async with Deadline(0.05, time.perf_counter()).enforced():
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
        asyncio.run(scenario())


def test_an_error_in_time_is_raised_unchanged() -> None:
    async def scenario() -> None:
        async with Deadline(60, time.perf_counter()).enforced():
            raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        asyncio.run(scenario())
